"""Interrupted, killed, run again: the tables are those of an undisturbed run, and nothing is computed twice."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pytest
from toy import TASKS, expert, sweep

from orchestrator.store import Store
from orchestrator.tables import Tables

ROOT = Path(__file__).parents[1]
PATIENCE = 1500.0  # seconds; a busy machine needs minutes to start Ray


def driver(results: Path) -> subprocess.Popen[str]:
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    command = [sys.executable, __file__, str(results)]
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True)


def wait_for(happened: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not happened():
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.02)


def files(results: Path) -> dict[Path, int]:
    kept = [results / "artefacts", results / "tables", results / "datasets"]
    return {path: path.stat().st_mtime_ns for folder in kept for path in folder.glob("**/*") if path.is_file()}


@pytest.mark.slow
def test_interrupted_in_training_killed_in_the_sweep_and_finished(finished, tmp_path):
    store, tables = Store(tmp_path), Tables(tmp_path / "tables")

    first = driver(tmp_path)
    wait_for(lambda: all(list(store.training_path(expert(t)).glob("checkpoint_*/log.json")) for t in TASKS), first)
    os.killpg(first.pid, signal.SIGINT)  # as a terminal does: to everyone
    began = time.monotonic()
    assert first.wait(PATIENCE) == 130, first.stderr.read()
    assert time.monotonic() - began < 120  # far less than what was left to do would take there
    interrupted = time.time()
    done = files(tmp_path)
    assert not tables.done("episodes")

    second = driver(tmp_path)
    wait_for(lambda: len(tables.done("episodes")) >= 2, second)
    second.kill()
    second.wait()
    assert len(tables.done("episodes")) < len(sweep())
    assert done.items() <= files(tmp_path).items()
    done = files(tmp_path)

    third = driver(tmp_path)
    assert third.wait(PATIENCE) == 0, third.stderr.read()
    assert done.items() <= files(tmp_path).items()

    undisturbed = Tables(finished / "tables")
    asked = pa.array([one.id for one in sweep()])
    for table, key in (("episodes", "evaluation"), ("training", "policy"), ("policies", "policy")):
        mine, theirs = (of.read(table) for of in (tables, undisturbed))
        theirs = theirs.filter(pa.compute.is_in(theirs[key], mine[key] if table != "episodes" else asked))
        drop = ["seconds"] if table == "training" else []
        assert mine.drop_columns(drop).equals(theirs.drop_columns(drop)), table
    for task in TASKS:
        a, b = (Store(root).load_policy(expert(task)).arrays() for root in (tmp_path, finished))
        assert all((a[name] == b[name]).all() for name in b)
    runs = tables.query("SELECT epoch(started) AS started FROM runs WHERE kind = 'train'").to_pylist()
    assert all(run["started"] < interrupted for run in runs)  # went on from a checkpoint of the first attempt


if __name__ == "__main__":
    from orchestrator.engine import Settings, run

    try:
        run(sweep(), Settings(results=Path(sys.argv[1]), address="local", cpus=2, threads=1, checkpoint_seconds=0.0))
    except KeyboardInterrupt:
        sys.exit(130)
