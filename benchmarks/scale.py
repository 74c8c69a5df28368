"""`python -m benchmarks.scale`: what a sweep costs besides its rollouts, and how much memory it takes on the way.

Real recipes, plan, Ray Tune, pool and commits; the rollout actors answer at once, with rows of no meaning. On a Ray of
its own, or on a cluster of several nodes that are all on this machine.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import torch
import typer
from ray.cluster_utils import Cluster
from rich.console import Console
from rich.table import Table

from benchmarks.instant import InstantWorker
from dt.model.architecture import Architecture
from dt.model.decision_transformer import DecisionTransformer
from dt.tasks import get_task
from orchestrator.messages import Failure
from orchestrator.plan import make_plan
from orchestrator.progress import Phase
from orchestrator.recipes import Evaluate, Merge, Recording, Train
from orchestrator.session import connect, prepare
from orchestrator.store import Store
from orchestrator.sweeps import sweep
from orchestrator.tables import Tables
from orchestrator.witness import processes

TASKS = ("hopper", "walker2d")
TINY = Architecture(width=16, layers=1, heads=1, context=5)
EXPERTS = tuple(Train(dataset=Recording(task=task, quality="expert", episodes=1), architecture=TINY) for task in TASKS)
LINE = 100  # evaluations of a line, which differ in alpha alone
SAMPLES = 10  # points of the curve


@dataclass(frozen=True)
class Sample:
    """Where a sweep is: evaluations done, seconds since its beginning, memory of this process and of the pool's."""

    done: int
    seconds: float
    driver_megabytes: float
    pool_megabytes: float


class Curve:
    """A sweep's progress, not shown but measured, at so many points."""

    def __init__(self, total: int) -> None:
        self._total, self._began = total, time.monotonic()
        self.samples: list[Sample] = []

    def show(self, done: int, note: str) -> None:
        """One more point, if it is time."""
        del note
        if done * SAMPLES >= self._total * (len(self.samples) + 1):
            memory = (_megabytes(os.getpid()), sum(_megabytes(pid) for pid, _ in processes("ray::RolloutPool")))
            self.samples.append(Sample(done, time.monotonic() - self._began, *memory))

    def say(self, text: str) -> None:
        """Nobody listens."""


def asked(count: int) -> list[Evaluate]:
    """So many evaluations, of as many merges of a pair, in lines."""
    return [
        Evaluate(
            policy=Merge(sources=EXPERTS, group="attention", alpha=number / count),
            task=TASKS[0],
            episodes=1,
            seed=number // LINE,
        )
        for number in range(count)
    ]


def orchestrate(evaluations: Sequence[Evaluate], root: Path, workers: int) -> tuple[list[Failure], list[Sample]]:
    """Plan and sweep them, in the Ray of this process, with actors that answer at once."""
    store, tables = Store(root), Tables(root / "tables")
    for expert in EXPERTS:
        torch.manual_seed(0)
        store.save(expert, DecisionTransformer(TINY, [get_task(expert.task)], 0.0).policy())
    plan, curve = make_plan(evaluations, store, tables), Curve(len(evaluations))
    failures = sweep(
        plan.evaluations, store, tables, workers=workers, phase=Phase(len(evaluations), curve), worker=InstantWorker
    )
    return failures, curve.samples


@contextmanager
def simulated(nodes: int | None, cpus: int) -> Iterator[str]:
    """Address of a Ray of so many nodes, which share these CPUs; of none, that of a Ray that is still to start."""
    if nodes is None:
        yield "local"
        return
    prepare(new_cluster=True)
    cluster = Cluster()
    try:
        for node in range(nodes):
            cluster.add_node(num_cpus=(cpus + node) // nodes, include_dashboard=False)
        yield cluster.address
    finally:
        cluster.shutdown()  # type: ignore[no-untyped-call]


def main(
    evaluations: Annotated[int, typer.Option(min=SAMPLES)] = 100_000,
    workers: Annotated[int, typer.Option(min=1, help="Rollout actors.")] = 2,
    nodes: Annotated[
        int | None, typer.Option(min=1, help="Of a simulated cluster; default: no cluster, but this process's Ray.")
    ] = None,
) -> None:
    """A table of time and memory on the way."""
    console, began = Console(), time.monotonic()
    recipes = asked(evaluations)
    console.print(f"{evaluations:,} recipes described in {time.monotonic() - began:.1f} s")
    with simulated(nodes, workers) as address, connect(address, cpus=workers), TemporaryDirectory() as folder:
        failures, samples = orchestrate(recipes, Path(folder), workers)
    table = Table("evaluations", "seconds", "ms each", "MB of the driver", "MB of the pool")
    for sample in samples:
        each = 1000 * sample.seconds / sample.done
        table.add_row(
            f"{sample.done:,}", f"{sample.seconds:.0f}", f"{each:.2f}",
            f"{sample.driver_megabytes:.0f}", f"{sample.pool_megabytes:.0f}",
        )  # fmt: skip
    table.caption = f"{workers} actors on {nodes or 1} nodes, {len(failures)} failures"
    console.print(table)


def _megabytes(process: int) -> float:
    """Resident memory."""
    pages = int(Path(f"/proc/{process}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


if __name__ == "__main__":
    typer.run(main)
