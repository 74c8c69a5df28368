"""Imports point one way: dt knows nothing of Ray or of what is built on it, and experiments compute nothing."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FORBIDDEN = {
    "dt": {"ray", "orchestrator", "experiments"},
    "experiments": {"ray", "torch", "numpy", "gymnasium", "pyarrow"},
}


def imported(path: Path) -> Iterator[str]:
    """Names of all modules a file imports, anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: say where from"
            yield node.module or ""


def modules(package: str) -> list[Path]:
    found = sorted((ROOT / package).rglob("*.py"))
    assert found
    return found


@pytest.mark.parametrize("package", FORBIDDEN)
def test_arrows_point_one_way(package: str) -> None:
    for path in modules(package):
        tops = {name.split(".")[0] for name in imported(path)}
        assert not tops & FORBIDDEN[package], path


def test_experiments_use_only_declarations() -> None:
    allowed = (
        "collections",
        "itertools",
        "typing",
        "dt.merging.groups",
        "dt.model.architecture",
        "dt.training.harmony",
        "dt.training.optimisation",
        "experiments",
        "orchestrator",
    )
    inside = ("orchestrator.experiment", "orchestrator.recipes", "experiments.")
    for path in modules("experiments"):
        for name in imported(path):
            assert name.startswith(allowed), f"{path}: {name}"
            if name.split(".")[0] in ("orchestrator", "experiments"):
                assert name.startswith(inside), f"{path}: {name}"


@pytest.mark.parametrize(
    ("names", "absent"),
    [
        (["orchestrator.cli"], {"ray", "torch", "matplotlib", "gymnasium", "minari", "pyarrow"}),
        (["experiments.figure_3", "experiments.table_1"], {"ray", "torch", "numpy", "pyarrow"}),
        (["orchestrator.rollouts", "orchestrator.training"], {"pandas", "matplotlib", "duckdb", "minari"}),
        (["benchmarks.instant"], {"torch", "pandas"}),
        (["dt.merging.merge", "dt.training.loop", "dt.rollout.evaluate", "dt.data.sources"], {"ray", "orchestrator"}),
    ],
)
def test_importing_stays_light(names: list[str], absent: set[str]) -> None:
    code = f"import sys, {', '.join(names)}; print(sorted({absent!r} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "[]"


def test_every_dependency_is_pinned() -> None:
    pins = {
        line.split("==")[0].lower().replace("_", "-")
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if line and not line.startswith("#")
    }
    assert {"torch", "ray", "gymnasium", "mujoco", "minari", "numpy", "pyarrow", "duckdb", "transformers"} <= pins
    text = (ROOT / "constraints.txt").read_text()
    assert "://" not in text
    assert "+cpu" not in text
