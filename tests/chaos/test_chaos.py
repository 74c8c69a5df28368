"""Killed anywhere, the same command ends with the tables of a run that nobody disturbed. `--kills` says how often."""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from attack import COORDINATORS, KILLS, LOSS, PATIENCE, POLITE, check_equal, program, rounds
from rich.console import Console
from rich.table import Table

FREE = 4 << 30  # bytes that a greedy actor may take before Ray ends it


@pytest.mark.slow
def test_killed_anywhere_the_tables_are_those_of_an_undisturbed_run(
    finished: Path, tmp_path: Path, pytestconfig: pytest.Config, capsys: pytest.CaptureFixture[str]
) -> None:
    asked, seed = pytestconfig.getoption("kills"), pytestconfig.getoption("chaos_seed")
    kinds = [LOSS, *KILLS]  # one each; a longer attack draws from all, and from what a user or a scheduler sends
    drawn = [LOSS, *KILLS, *COORDINATORS, *POLITE]
    kinds += np.random.default_rng(seed).choice(drawn, max(0, asked - len(KILLS))).tolist()

    def tell(text: str) -> None:
        with capsys.disabled():
            print(text, flush=True)

    done, rows, runs = Counter[str](), 0, 0
    for each in rounds(tmp_path, kinds, seed, tell if asked > len(KILLS) else lambda _: None):
        rows += check_equal(each.results, finished)
        done.update(blow.kind for blow in each.blows)
        runs += each.runs
    assert done == Counter(kinds)
    table = Table("hit", "times")
    for kind, times in sorted(done.items()):
        table.add_row(kind, str(times))
    table.caption = f"{runs} runs; {rows} rows as in the undisturbed run"
    Console().print(table)


@pytest.mark.chaos
@pytest.mark.slow
def test_a_clock_that_jumps_changes_nothing(finished: Path, tmp_path: Path) -> None:
    run = program("driver.py", tmp_path / "results", RAY_ADDRESS="")
    run["env"]["PYTHONPATH"] += f"{os.pathsep}{Path(__file__).with_name('jumping')}"
    watch = "import time; began = time.time(); time.sleep(3); print(abs(time.time() - began) > 3000)"
    seen = subprocess.run([sys.executable, "-c", watch], env=run["env"], capture_output=True, text=True, check=True)
    assert seen.stdout == "True\n"
    done = subprocess.run(**run, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr[-3000:]
    assert check_equal(tmp_path / "results", finished) > 0


@pytest.mark.slow
def test_a_rollout_actor_that_stands_still_is_replaced_and_fails_no_evaluation() -> None:
    often = {f"RAY_grpc_client_keepalive_{limit}_ms": "2000" for limit in ("time", "timeout")}
    done = subprocess.run(**program("stalled.py", RAY_ADDRESS="", **often), capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    told = json.loads(done.stdout.splitlines()[-1])
    assert len(set(told["first"])) == 2
    assert set(told["second"]) == set(told["first"]) - {told["stopped"]}
    assert len(set(told["last"])) == 2
    assert told["stopped"] not in told["last"]


@pytest.mark.chaos
@pytest.mark.slow
def test_a_rollout_actor_that_takes_all_memory_is_ended_and_fails_its_own_evaluation_at_most(tmp_path: Path) -> None:
    total, available = _memory()
    if available < 2 * FREE:
        pytest.skip(f"takes {2 * FREE >> 30} GiB of memory")
    limits = {"usage_threshold": str((total - available + FREE) / total), "monitor_refresh_ms": "100"}
    often = {f"RAY_memory_{name}": value for name, value in limits.items()}
    hungry = program("hungry.py", tmp_path / "mark", RAY_ADDRESS="", **often)
    done = subprocess.run(**hungry, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    told = json.loads(done.stdout.splitlines()[-1])
    once, always, *others = told["answers"]
    assert isinstance(once, int)
    assert always == "its process died (of memory? with its machine?): run the same command again"
    assert all(isinstance(one, int) for one in others)
    assert len(set(told["after"])) == 2
    assert not set(told["after"]) & set(told["greedy"])


def _memory() -> tuple[int, int]:
    """Bytes of this machine, and of them those that a process could take."""
    said = dict(line.split()[:2] for line in Path("/proc/meminfo").read_text().splitlines())
    return int(said["MemTotal:"]) << 10, int(said["MemAvailable:"]) << 10
