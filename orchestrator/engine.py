"""Running a plan on Ray: recordings, then trainings, then sweeps; everything done is committed at once and never redone."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from dt.errors import UserError
from orchestrator.plan import Plan, make_plan, trained
from orchestrator.progress import phase
from orchestrator.recipes import Evaluate, Recipe, Recording, Train, closure
from orchestrator.session import Session, check_visible, connect, in_job
from orchestrator.store import Store, explained
from orchestrator.tables import Tables

if TYPE_CHECKING:
    from orchestrator.rollouts import Failure
    from orchestrator.training import Slots


@dataclass(frozen=True)
class Settings:
    """How to run. None takes what fits the machine or cluster; numbers of actors change no result, `threads` may."""

    results: Path = Path("results")
    address: str | None = None  # of a Ray cluster; None: RAY_ADDRESS, else an embedded Ray
    rollout_workers: int | None = None  # processes of one thread each; None: one for each CPU
    training_slots: int | None = None  # trainings at once; None: CPUs / threads, or four a GPU
    threads: int | None = None  # of torch, for each training; None: a quarter of the CPUs
    cpus: int | None = None  # of an embedded Ray; None: all
    checkpoint_seconds: float = 20.0  # a killed training loses no more than that


def run(recipes: Sequence[Recipe], settings: Settings, console: Console | None = None) -> Plan:
    """Compute what is missing of these recipes and of all they need, and commit it; returns what was missing.

    Raises UserError when something could not be computed: the first of all failures, after everything else is done.
    The same call after a failure, an interrupt or a kill goes on where it stopped.
    """
    console = console or Console(stderr=True)
    if in_job() and not settings.results.is_absolute():
        raise UserError(
            f"inside a Ray job the folder {settings.results} would vanish with the job: give --results an absolute path "
            "that all nodes share"
        )
    store, tables = Store(settings.results), Tables(Store(settings.results).tables)
    plan = make_plan(recipes, store, tables)
    if plan.empty and not _uncommitted(recipes, store):
        console.print(plan.describe(), highlight=False)
        return plan
    with store.lock():
        store.sweep()
        _commit_finished(recipes, store, tables)
        plan = make_plan(recipes, store, tables)  # again: another process may have worked until we got the lock
        console.print(plan.describe(), highlight=False)
        if not plan.empty:
            _run(plan, settings, store, tables, console)
    return plan


def _run(plan: Plan, settings: Settings, store: Store, tables: Tables, console: Console) -> None:
    with connect(settings.address, cpus=settings.cpus, dashboard=bool(plan.trainings)) as session:
        if not session.embedded:
            check_visible(store.root)
        failures: list[Failure] = []
        if plan.recordings:
            _record(plan.recordings, store, tables, console)
        if plan.trainings:
            failures += _train(plan, settings, session, store, tables, console)
        stored = store.policies()
        ready = [e for e in plan.evaluations if all(train.id in stored for train in trained(e.policy))]
        if ready:
            failures += _evaluate(ready, settings, session, store, tables, console)
    if failures:
        raise _failed(failures, skipped=len(plan.evaluations) - len(ready))


def _record(recordings: Sequence[Recording], store: Store, tables: Tables, console: Console) -> None:
    """Chunks of all recordings in parallel; each recording is written here as soon as its last chunk is in."""
    import ray

    from dt.behaviour.record import chunks, write_recording
    from dt.data.sources import load_recorded
    from dt.data.trajectories import concatenate
    from orchestrator.rollouts import explain
    from orchestrator.rows import run_row, run_rows

    began, clock = datetime.now(UTC), time.perf_counter()
    record = ray.remote(num_cpus=1, max_retries=3)(_record_chunk)
    parts = {
        recording.id: [
            record.remote(recording.task, recording.quality, recording.seed, first, count)
            for first, count in chunks(recording.episodes)
        ]
        for recording in recordings
    }
    waiting = [reference for references in parts.values() for reference in references]
    with phase(console, "recordings", sum(recording.episodes for recording in recordings), "episodes") as shown:
        for recording in recordings:
            try:
                ...
            except ray.exceptions.RayError as error:
                raise UserError(f"recording: {explain(error)}") from error
