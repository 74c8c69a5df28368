"""A real sweep under attack: its processes are killed at seeded random moments, and the same command goes on.

A round is one results folder; it is over when the command succeeds. Rounds follow each other until every blow has hit.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
from toy import everything

from orchestrator.recipes import Evaluate, FineTune, Fisher, Recording, Train, closure
from orchestrator.store import Store
from orchestrator.tables import Tables
from orchestrator.witness import stat

HERE = Path(__file__).parent
PATIENCE = 1500.0  # seconds; a busy machine needs minutes to start Ray
QUICK = 120.0  # seconds that a run may take to end when it is told to, or be silent for when its Ray is hit
GRACE = 180.0  # seconds to notice that the run is over: Ray's agents give up a head that was killed after 60
DELAY = 3.0  # seconds at most between meeting a victim and striking
FAILED, INTERRUPTED = 2, 130

WORKERS = ("training worker", "rollout actor")  # a run goes on without them
KILLS = (*WORKERS, "driver", "head", "raylet")
NODES = ("raylet", "agent")  # without its agent a raylet leaves, too
COORDINATORS = ("rollout pool", "trial", "training controller", "agent")  # between the driver and the workers
LOSS = "dataset"  # not a process: a recording is deleted under the run's feet
POLITE = {"interrupt": signal.SIGINT, "termination": signal.SIGTERM}  # to the driver, which then tidies up
_COMMANDS = {
    "training worker": b"ray::RayTrainWorker",
    "rollout actor": b"ray::RolloutWorker",
    "rollout pool": b"ray::RolloutPool",
    "trial": b"ray::ImplicitFunc",
    "training controller": b"ray::TrainController",
    "agent": b"ray::RuntimeEnvAgent",
    "raylet": b"raylet/raylet",
    "head": b"gcs_server",
}


@dataclass(frozen=True)
class Blow:
    """What was hit and when; kept: the trainings of which there was a checkpoint to go on from."""

    kind: str
    time: float  # seconds since the epoch
    kept: frozenset[str]


@dataclass(frozen=True)
class Round:
    """A results folder that was completed in spite of it all, and how often the command was given for it."""

    results: Path
    blows: tuple[Blow, ...]
    runs: int


def rounds(folder: Path, kinds: Sequence[str], seed: int, tell: Callable[[str], None] = print) -> Iterator[Round]:
    """Attack with these kinds, in this order; yields each round as it is complete.

    Raises AssertionError when a run hangs, ends that should have gone on, or touches what was committed before.
    """
    rng, left = np.random.default_rng(seed), list(kinds)
    while left:
        results = folder / f"round-{len(list(folder.glob('round-*.log')))}"
        blows: list[Blow] = []
        runs: list[Run] = []
        status = None
        while status != 0:
            before, run = committed(results), Run(results)
            runs.append(run)
            try:
                struck: list[str] = []
                while left and ends_with(struck) is None and (blow := run.strike(left[0], rng)):
                    blows.append(blow)
                    struck.append(left.pop(0))
                    tell(f"{results.name}, run {len(runs)}: {struck[-1]}, {len(left)} to come")
                status = run.end(struck)
            except BaseException:
                run.bury()
                raise
            check_untouched(results, before, besides=[results / "datasets"] * (LOSS in struck))
        check_resumed(results, blows)
        for run in runs:
            run.check_gone()
        yield Round(results, tuple(blows), len(runs))


def ends_with(struck: Sequence[str]) -> str | None:
    """The blow that no run survives, if it was hit by one."""
    return next((kind for kind in struck if kind not in (*WORKERS, LOSS)), None)


class Run:
    """The command, given once."""

    def __init__(self, results: Path) -> None:
        self.results, self._log = results, results.with_suffix(".log")
        with self._log.open("a") as log:
            self._silence = log.tell()
            self._process = subprocess.Popen(
                **program("driver.py", results, RAY_ADDRESS=""), stdout=log, stderr=log, start_new_session=True
            )

    def strike(self, kind: str, rng: np.random.Generator) -> Blow | None:
        """Meet such a process and hit it, a random while later; None when the run ended before.

        Three times of four only after something new was committed: else the sweep might never come to its end.
        """
        before = committed(self.results) if rng.random() < 0.75 else None
        deadline = time.monotonic() + PATIENCE
        while (victim := self._find(kind)) is None or before == committed(self.results):
            if self._process.poll() is not None:
                return None
            assert time.monotonic() < deadline, f"no {kind} in sight; {self._said()}"
            time.sleep(0.1)
        time.sleep(rng.uniform(0.0, DELAY))
        blow = Blow(kind, time.time(), checkpointed(self.results))
        try:
            if kind == LOSS:
                lose(recordings(self.results)[0])
            elif kind == "interrupt":  # as a terminal does: to everyone
                os.killpg(self._process.pid, POLITE[kind])
            else:
                os.kill(victim, POLITE.get(kind, signal.SIGKILL))
        except ProcessLookupError:
            return self.strike(kind, rng)
        return blow

    def end(self, struck: Sequence[str]) -> int:
        """Wait for the end that befits what was hit, and return the exit status."""
        fatal = ends_with(struck)
        patience = QUICK if fatal in (*POLITE, *NODES, "head") else PATIENCE
        began, length = time.monotonic(), self._log.stat().st_size
        heard = began
        while (status := self._process.poll()) is None:
            hangs = time.monotonic() - heard > patience or time.monotonic() - began > PATIENCE
            assert not hangs, f"hangs after {struck}; {self._said()}"
            if length != (length := self._log.stat().st_size) and fatal not in POLITE:
                heard = time.monotonic()  # it goes on, with another Ray: the first was hit while it started
            time.sleep(0.1)
        befitting = {None: (0,), "driver": (0, -signal.SIGKILL)} | dict.fromkeys(POLITE, (0, INTERRUPTED))
        befitting |= dict.fromkeys(("head", "raylet", *COORDINATORS), (0, FAILED))
        fitting = (*befitting[fatal], *[FAILED] * (LOSS in struck))
        if fatal in POLITE and Tables(self.results / "tables").done("episodes") >= {each.id for each in everything()}:
            fitting += (-POLITE[fatal],)  # it had done its work, and Python was leaving
        by_ray = (1, -signal.SIGKILL)  # its C++ left, at a look into its node's store; or stayed, and the witness acted
        if fatal in (*NODES, "head") and "Traceback" not in self._said():
            fitting += by_ray
        assert status in fitting, f"status {status} after {struck}; {self._said()}"
        has_to_say_why = status == FAILED or (status in by_ray and fatal != "driver")
        deadline = time.monotonic() + GRACE
        while has_to_say_why and not self._said().splitlines()[-1].startswith("mergedt: "):
            assert time.monotonic() < deadline, f"leaves without a sentence; {self._said()}"
            time.sleep(0.1)
        return status

    def check_gone(self) -> None:
        """Everything that it started ends, if not at once."""
        deadline = time.monotonic() + GRACE
        while left := self._left_behind():
            assert time.monotonic() < deadline, f"{left} live on after {self.results.name}"
            time.sleep(0.5)

    def _left_behind(self) -> list[str]:
        """Commands of what still runs in the session of this run."""
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):  # it ended meanwhile
                state, _, _, session = stat(int(folder.name))[:4]
                if int(session) == self._process.pid and state != "Z":
                    found.append((folder / "cmdline").read_text().rstrip("\0").replace("\0", " "))
        return found

    def bury(self) -> None:
        """End what is left of it: an assertion has failed."""
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def _find(self, kind: str) -> int | None:
        """A living process of that kind that descends from the driver; itself, for what is not done to others."""
        if kind == LOSS and not recordings(self.results):
            return None
        if kind in POLITE and self._log.stat().st_size == self._silence:  # still importing, before it can be polite
            return None
        if kind not in _COMMANDS:
            return self._process.pid if self._process.poll() is None else None
        for folder in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):  # it ended meanwhile
                command, process = (folder / "cmdline").read_bytes(), int(folder.name)
                if _COMMANDS[kind] in command and self._descends(process):
                    parent = Path("/proc", stat(process)[1], "cmdline")
                    if parent.read_bytes() != command:  # else it is about to become another program
                        return process
        return None

    def _descends(self, process: int) -> bool:
        while process > 1 and process != self._process.pid:
            process = int(stat(process)[1])
        return process == self._process.pid

    def _said(self) -> str:
        """All that this run has printed."""
        return "it said:\n" + self._log.read_bytes()[self._silence :].decode()


def program(name: str, *arguments: object, **environment: str) -> dict[str, Any]:
    """For `subprocess`: a program of this folder, which finds the project, its tests and its neighbours."""
    paths = os.pathsep.join(map(str, (HERE.parents[1], HERE.parent, HERE)))
    command = [sys.executable, str(HERE / name), *map(str, arguments)]
    return {"args": command, "env": {**os.environ, "PYTHONPATH": paths, **environment}}


def committed(results: Path) -> Mapping[Path, int]:
    """Every file that no later run may touch, and when it was written."""
    kept = (results / name for name in ("artefacts", "tables", "datasets"))
    stamps: dict[Path, int] = {}
    for path in (path for folder in kept for path in folder.glob("**/*")):
        hidden = any(part.startswith(".") for part in path.relative_to(results).parts)
        with suppress(FileNotFoundError):
            if path.is_file() and not hidden:
                stamps[path] = path.stat().st_mtime_ns
    return stamps


def checkpointed(results: Path) -> frozenset[str]:
    """The trainings that left a checkpoint."""
    return frozenset(path.parent.name for path in results.glob("training/*/state.safetensors"))


def recordings(results: Path) -> list[Path]:
    """The folders of what was recorded, in no order."""
    return [path.parents[1] for path in committed(results) if path.match("data/metadata.json")]


def lose(folder: Path) -> None:
    """Delete it, at one blow."""
    doomed = folder.with_name(f".lost-{folder.name}")
    folder.rename(doomed)
    shutil.rmtree(doomed)


def check_untouched(results: Path, before: Mapping[Path, int], besides: Sequence[Path] = ()) -> None:
    """What was committed before is there and was not written again, but for what lies in those folders."""
    after = committed(results)
    kept = {path: stamp for path, stamp in before.items() if not any(map(path.is_relative_to, besides))}
    touched = [path for path, stamp in kept.items() if after.get(path) != stamp]
    assert not touched, f"committed before, touched after: {touched}"


def check_resumed(results: Path, blows: Sequence[Blow]) -> None:
    """A training that had a checkpoint went on from it: what it says of its beginning is older than the blow."""
    rows = Tables(results / "tables").query("SELECT recipe, epoch(started) AS started FROM runs").to_pylist()
    began = {row["recipe"]: row["started"] for row in rows}
    for blow in blows:
        late = [recipe for recipe in blow.kept if began[recipe] > blow.time]
        assert not late, f"began again after {blow.kind}, though there was a checkpoint: {late}"


def check_equal(results: Path, undisturbed: Path) -> int:
    """Tables and artefacts are the undisturbed run's, bit for bit; returns the number of rows compared."""
    mine, theirs = (Tables(root / "tables") for root in (results, undisturbed))
    compared = 0
    for table, key in (("episodes", "evaluation"), ("training", "policy"), ("policies", "policy")):
        ours, reference = mine.read(table), theirs.read(table)
        reference = reference.filter(pc.is_in(reference[key], ours[key].combine_chunks()))  # other tests add rows there
        timing = ["seconds"] if table == "training" else []
        assert ours.drop_columns(timing).equals(reference.drop_columns(timing)), table
        compared += len(ours)
    behind = closure(everything()).values()
    assert mine.done("episodes") == {one.id for one in everything()}
    assert mine.done("runs") == {
        one.id for one in behind if isinstance(one, Evaluate | Train | FineTune | Fisher | Recording)
    }
    for one in behind:
        if isinstance(one, Train | FineTune):
            a, b = (Store(root).load_policy(one).arrays() for root in (results, undisturbed))
            assert a.keys() == b.keys()
            assert all(np.array_equal(a[name], b[name]) for name in a)
    assert Store(results).unfinished() == frozenset()
    return compared
