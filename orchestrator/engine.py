"""Running a plan on Ray: recordings, then, part by part, trainings and sweeps. What is done is committed at once."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence, Set
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from dt.errors import UserError
from dt.files import explained
from orchestrator.declarations import state_datasets
from orchestrator.place import Folder
from orchestrator.plan import Part, Plan, datasets_of, make_plan, parts_of
from orchestrator.progress import Pace, duration, phase
from orchestrator.recipes import Artefact, Evaluate, Job, Recipe, Recording, closure, ingredients, inputs
from orchestrator.session import Session, check_visible, connect, vanishes
from orchestrator.store import Store
from orchestrator.tables import Tables

if TYPE_CHECKING:
    from dt.data.trajectories import Trajectories
    from orchestrator.messages import Failure
    from orchestrator.training import Slots

THREADS_SHARE = 4  # a training gets a quarter of a node's CPUs: small models gain little from more threads
PART = 8  # trainings a slot between two rounds of evaluations: starting a round costs less than one of them
TRAININGS_PER_GPU = 4  # a base-size model leaves most of a GPU idle


@dataclass(frozen=True)
class Settings:
    """How to run. None takes what fits the machine or cluster; numbers of actors change no result, `threads` may."""

    results: str | Path = "results"  # a folder that all nodes see, or an address as s3://bucket/results
    address: str | None = None  # of a Ray cluster; None: RAY_ADDRESS, else an embedded Ray
    rollout_workers: int | None = None  # processes of one thread each; None: one for each CPU
    training_slots: int | None = None  # trainings at once; None: CPUs / threads, or four a GPU
    threads: int | None = None  # of torch, for each training; None: a quarter of a node's CPUs
    cpus: int | None = None  # of an embedded Ray; None: all
    checkpoint_seconds: float = 20.0  # what a killed training loses at most; more where writing takes over a second


def run(recipes: Sequence[Recipe], settings: Settings, console: Console | None = None) -> Plan:
    """Compute what is missing of these recipes and of all they need, and commit it; returns what was missing.

    Raises UserError when something could not be computed: the first of all failures, after everything else is done.
    The same call after a failure, an interrupt or a kill goes on where it stopped.
    """
    console = console or Console(stderr=True)
    store = Store(settings.results)
    if isinstance(store.place, Folder) and vanishes(store.root):
        raise UserError(
            f"the folder {store.root} vanishes with this Ray job: give --results an absolute path that all nodes share"
        )
    tables = store.open_tables()
    store.fetch_notes()
    plan = make_plan(recipes, store, tables)
    if plan.empty and not _begun(recipes, store):
        console.print(plan.describe(), highlight=False, soft_wrap=True)
        return plan
    with store.lock():
        store.sweep()
        tables = store.open_tables()  # again: another process may have worked until we got the lock
        if store.unfinished():
            _commit_finished(recipes, store, tables, console)
        plan = make_plan(recipes, store, tables)
        console.print(plan.describe(), highlight=False, soft_wrap=True)
        if not plan.empty:
            _run(plan, settings, store, tables, console)
    return plan


def _run(plan: Plan, settings: Settings, store: Store, tables: Tables, console: Console) -> None:
    from orchestrator.making import read_text, texts_of

    unpinned = (text for text in texts_of(plan.artefacts) if text.corpus_hash is None)  # planning read the others
    for text in {(text.corpus, text.characters): text for text in unpinned}.values():
        read_text(text, store)  # here first, for another than it was is better known before anything is computed
    with connect(settings.address, cpus=settings.cpus) as session:
        if not session.embedded:
            check_visible(store.place)
        failures: list[Failure] = []
        if plan.recordings:
            failures += _record(plan.recordings, store, tables, console)
            state_datasets(tables, store, datasets_of(plan.artefacts))
        # By the whole plan: a thread more or less in a later part would change its sums.
        slots = slots_for(len(plan.artefacts), settings, session)
        skipped = 0
        parts = parts_of(plan, PART * slots.count)
        pace = _pace(parts, plan, tables, session.cpus) if len(parts) > 1 else None
        for number, part in enumerate(parts, 1):
            if pace:
                size = f"{len(part.trainings):,} trainings and {len(part.evaluations):,} evaluations"
                left = f"about {duration(pace.left(number - 1))} left in all"
                console.print(f"part {number} of {len(parts)}, with {size}; {left}", highlight=False, soft_wrap=True)
            failures += _make(part.artefacts, slots, settings, store, tables, console)
            stored = store.stored()  # not those that failed
            ready = [e for e in part.evaluations if all(made.id in stored for made in ingredients(e))]
            skipped += len(part.evaluations) - len(ready)
            if ready:
                failures += _evaluate(ready, settings, session, store, tables, console)
    if failures or skipped:
        raise _failed(failures, skipped)


def _pace(parts: Sequence[Part], plan: Plan, tables: Tables, cores: int) -> Pace:
    from orchestrator.costs import estimate, unit_costs

    costs = unit_costs(tables)
    alone = (replace(plan, recordings=(), artefacts=part.artefacts, evaluations=part.evaluations) for part in parts)
    return Pace([sum(estimate(each, costs, cores).values()) for each in alone])


def _record(recordings: Sequence[Recording], store: Store, tables: Tables, console: Console) -> list[Failure]:
    """Chunks of all recordings in parallel; each recording is written here as soon as its last chunk is in. Returns
    those that failed."""
    import ray

    from dt.behaviour.record import chunks
    from orchestrator.messages import Failure, explain

    began = datetime.now(UTC)
    record = ray.remote(num_cpus=1, max_retries=3)(_record_chunk)
    place: dict[ray.ObjectRef[_Chunk], tuple[Recording, int]] = {}
    for recording in recordings:
        for number, (first, count) in enumerate(chunks(recording.episodes)):
            place[record.remote(recording, first, count)] = recording, number
    collected: dict[str, dict[int, _Chunk]] = {recording.id: {} for recording in recordings}
    failed: dict[str, Failure] = {}
    with phase(console, "recordings", sum(recording.episodes for recording in recordings), "episodes") as shown:
        waiting = list(place)
        while waiting:
            (reference,), waiting = ray.wait(waiting)
            recording, number = place.pop(reference)
            try:
                chunk: _Chunk = ray.get(reference)
            except ray.exceptions.RayError as error:
                what = f"recording {recording.quality} {recording.task}"
                failed.setdefault(recording.id, Failure(what, explain(error)))
                continue
            collected[recording.id][number] = chunk
            if len(collected[recording.id]) == len(chunks(recording.episodes)):
                done = collected.pop(recording.id)
                _write_recording(recording, [done[index] for index in sorted(done)], began, store, tables)
            shown.advance(chunk.trajectories.episodes, f"{recording.task} {recording.quality}")
    return list(failed.values())


@dataclass(frozen=True)
class _Chunk:
    trajectories: Trajectories
    seconds: float


def _record_chunk(recording: Recording, first: int, count: int) -> _Chunk:
    """In a Ray task."""
    from dt.behaviour.record import record_chunk

    clock = time.perf_counter()
    trajectories = record_chunk(recording.task, recording.quality, recording.seed, first, count)
    return _Chunk(trajectories, time.perf_counter() - clock)


def _write_recording(
    recording: Recording, chunks: Sequence[_Chunk], began: datetime, store: Store, tables: Tables
) -> None:
    """Join the chunks, write the dataset, and read it back to be sure that it is the one. Its row comes first: once the
    dataset is there, nobody would write that any more."""
    from dt.behaviour.record import write_recording
    from dt.data.sources import load_recorded
    from dt.data.trajectories import concatenate
    from orchestrator.rows import run_row, run_rows

    which = (recording.task, recording.quality, recording.episodes, recording.seed, store.datasets)
    trajectories = concatenate([chunk.trajectories for chunk in chunks])
    seconds = sum(chunk.seconds for chunk in chunks)
    tables.append("runs", recording.id, run_rows(run_row(recording, began, seconds, threads=1, precision=None)))
    with explained(store.datasets):
        path = write_recording(trajectories, *which)
    store.place.push(path)
    if load_recorded(*which).content_hash != trajectories.content_hash:
        raise UserError(f"the recording at {path} does not read back as it was written: check the disk and delete it")


def _make(
    artefacts: Sequence[Artefact], slots: Slots, settings: Settings, store: Store, tables: Tables, console: Console
) -> list[Failure]:
    """Wave after wave: what can be made from what is stored, until nothing more can."""
    from orchestrator.training import compute_all, train_all

    failures: list[Failure] = []
    left = list(artefacts)
    while wave := _ready(left, store.stored()):
        taken = {artefact.id for artefact in wave}
        left = [artefact for artefact in left if artefact.id not in taken]
        others = [artefact for artefact in wave if not isinstance(artefact, Job)]
        trainings = [artefact for artefact in wave if isinstance(artefact, Job)]
        if others:
            with phase(console, "estimates", len(others), "of them") as shown:
                failures += compute_all(others, store, slots=slots, phase=shown)
        if trainings:
            with phase(console, "trainings", sum(each.optimisation.steps for each in trainings), "steps") as shown:
                failures += train_all(
                    trainings, store, tables, slots=slots, checkpoint_seconds=settings.checkpoint_seconds, phase=shown
                )
    return failures


def _ready(artefacts: Sequence[Artefact], stored: Set[str]) -> list[Artefact]:
    """Those whose inputs are all stored."""

    def made(artefact: Artefact) -> bool:
        return all(part.id in stored for needed in inputs(artefact) for part in ingredients(needed))

    return [artefact for artefact in artefacts if made(artefact)]


def slots_for(artefacts: int, settings: Settings, session: Session) -> Slots:
    """How trainings and estimates, so many in all, share the CPUs and GPUs.

    Threads depend on the machines and the settings alone: sums in another number of threads round differently, so a
    resume with fewer trainings left must not change it. Where there are GPUs, trainings are on their nodes alone; those
    of one GPU get equal parts of it.
    """
    from orchestrator.training import Slots

    gpus = session.gpus
    nodes = [node for node in session.nodes if node.gpus or not gpus]
    if gpus:
        share = min(node.cpus // (TRAININGS_PER_GPU * node.gpus) for node in nodes)
    else:
        share = max(node.cpus for node in nodes) // THREADS_SHARE
    threads = settings.threads or max(1, share)
    fitting = sum(node.cpus // threads for node in nodes)
    count = settings.training_slots or (TRAININGS_PER_GPU * gpus if gpus else fitting)
    count = max(1, min(count, fitting, artefacts))
    return Slots(count, threads, gpu=math.floor(1000 / math.ceil(count / gpus)) / 1000 if gpus else 0.0)


def _evaluate(
    evaluations: Sequence[Evaluate],
    settings: Settings,
    session: Session,
    store: Store,
    tables: Tables,
    console: Console,
) -> list[Failure]:
    from orchestrator.sweeps import sweep

    workers = settings.rollout_workers or session.cpus
    if session.embedded:
        workers = min(workers, session.cpus)
    with phase(console, "evaluations", len(evaluations), "policies") as shown:
        return sweep(evaluations, store, tables, workers=min(workers, len(evaluations)), phase=shown)


def _commit_finished(recipes: Sequence[Recipe], store: Store, tables: Tables, console: Console) -> None:
    """Complete what a kill interrupted between the end of a training and the last of its rows."""
    from orchestrator.training import commit_outcome

    say = partial(console.print, highlight=False, soft_wrap=True)
    for recipe in _begun(recipes, store):
        if not commit_outcome(recipe, store, tables, say) and store.has(recipe):
            store.discard_training(recipe)


def _begun(recipes: Sequence[Recipe], store: Store) -> list[Job]:
    """The trainings behind these recipes that have begun and are not fully committed."""
    begun = store.unfinished()
    if not begun:
        return []
    return [recipe for recipe in closure(recipes).values() if isinstance(recipe, Job) and recipe.id in begun]


def _failed(failures: Sequence[Failure], skipped: int) -> UserError:
    waiting = f"{skipped} evaluations wait for a policy"
    if not failures:  # it was there when the plan was made
        return UserError(f"{waiting} that was deleted meanwhile: run the same command again")
    first = failures[0]
    more = [f"{len(failures) - 1} more failed"] * (len(failures) > 1) + [waiting] * (skipped > 0)
    return UserError(f"{first.what} failed: {first.why}" + (f" ({'; '.join(more)})" if more else ""))
