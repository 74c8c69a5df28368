"""`python -m benchmarks [CASE...]`: one table, and rows in the table `benchmarks`."""

import os
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import pyarrow as pa
import torch
import typer
from rich.console import Console
from rich.table import Table

from benchmarks.cases import CASES
from benchmarks.measure import Measurement
from dt.errors import unknown
from dt.memory import keep_freed_memory
from orchestrator.rows import machine
from orchestrator.tables import SCHEMAS, Tables


def main(
    cases: Annotated[list[str] | None, typer.Argument(help=f"{', '.join(CASES)}; default: all.")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Of each, in turn.")] = 9,
    results: Annotated[Path, typer.Option(help="Folder whose tables the rows go to.")] = Path("results"),
) -> None:
    """Measure on one core, so that numbers of machines of any size compare."""
    torch.set_num_threads(1)
    keep_freed_memory()  # as all workers do; it helps the literal way as well
    console, started = Console(), datetime.now(UTC)
    for name in cases or CASES:
        if name not in CASES:
            raise unknown("benchmark", name, CASES)
    found = [measurement for name in cases or CASES for measurement in CASES[name](rounds)]
    console.print(table_of(found))
    commit(found, started, rounds, results)


def commit(found: list[Measurement], started: datetime, rounds: int, results: Path) -> None:
    """Write the rows of one call."""
    run = f"{started:%Y%m%dT%H%M%S}-{os.getpid()}"
    rows = [
        {
            "run": run, "started": started, "rounds": rounds, "name": each.name, "unit": each.unit,
            "seconds": each.ours, "literal_seconds": each.literal, "floor_seconds": each.floor, **machine(),
        }
        for each in found
    ]  # fmt: skip
    Tables(results / "tables").append("benchmarks", run, pa.Table.from_pylist(rows, SCHEMAS["benchmarks"]))


def table_of(found: list[Measurement]) -> Table:
    """Ours, the literal way, the floor, and their ratios."""
    table = Table("", "a", "ours", "literal", "× faster", "floor", "of the floor", caption="medians, one core")
    for each in found:
        table.add_row(
            each.name, each.unit, _time(each.ours), _time(each.literal),
            f"{each.speedup:.1f}" if each.speedup else "", _time(each.floor),
            f"{each.of_floor:.0%}" if each.of_floor else "",
        )  # fmt: skip
    return table


def _time(seconds: float | None) -> str:
    if seconds is None:
        return ""
    return f"{seconds * 1e3:.3g} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.3g} µs"


if __name__ == "__main__":
    typer.run(main)
