"""Training on Ray Train: one `TorchTrainer` for each slot of the machine, launched from a thin Tune trial, whose worker
takes the slot's recipes one after another: starting a run costs as much as half a minute of training.
Fisher estimates and imports of language models take no steps and run as plain Ray tasks.

The worker keeps a recipe's checkpoint under `training/<id>/` and, when it is through, leaves the policy and its rows
there; the driver alone moves them into the store and the tables. A run that is killed, anywhere, goes on from there.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field, TypeAdapter

from dt.errors import UserError
from orchestrator.costs import multiply_adds
from orchestrator.messages import Failure, brief, describe, explain
from orchestrator.place import UnreachableError
from orchestrator.progress import Phase
from orchestrator.recipes import Fisher, ImportLanguage, Job, Pretrain
from orchestrator.rows import policy_row, run_row, run_rows, training_rows
from orchestrator.store import PROGRESS, Store
from orchestrator.tables import Tables

if TYPE_CHECKING:
    import pyarrow as pa

    from dt.training.loop import TrainingState
    from orchestrator.place import Place

LOG_EVERY = 50  # optimiser steps between two rows of the table `training`
MAX_FAILURES = 3  # workers that a recipe may lose between two checkpoints
MAX_ATTEMPTS = 10  # at a recipe in one run, checkpoints or not; a mistake of the user is not tried again
PROGRESS_SECONDS = 2.0
DEATH = "the death of its worker, for want of memory perhaps"
NOT_BEGUN = "it was not begun, others kept the workers from it: run the same command again"
_JOB: TypeAdapter[Job] = TypeAdapter(Annotated[Job, Field(discriminator="kind")])
_STATE, _LOG, _ATTEMPTS = "state.safetensors", "log.json", "attempts.json"

_ENVIRONMENT = {
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # a helper process of 120 MB for each run
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "300",  # a loaded laptop takes its time to import torch
}


@dataclass(frozen=True)
class Slots:
    """How trainings share the machine: `count` at once, each with so many torch threads and that part of a GPU."""

    count: int
    threads: int
    gpu: float

    @property
    def cpus(self) -> float:
        """CPUs that Ray sets aside for one: fewer than it uses, for the waiting trials need some; whole above 1."""
        return 0.9 if self.threads == 1 else self.threads - 1


@dataclass(frozen=True)
class Lane:
    """What a training worker has to know; travels as JSON."""

    recipes: tuple[str, ...]  # one after another
    results: str
    threads: int
    gpu: bool
    checkpoint_seconds: float


def train_all(
    recipes: Sequence[Job], store: Store, tables: Tables, *, slots: Slots, checkpoint_seconds: float, phase: Phase
) -> list[Failure]:
    """Train and commit all of them; returns those that failed."""
    from orchestrator.tuning import run_trials

    finished: set[str] = set()
    errors: dict[str, str] = {}

    def look() -> None:
        """Commit what is finished and show the steps that the workers note. Through Ray this would take more actors."""
        store.fetch_notes()
        for recipe in recipes:
            if recipe.id not in finished and commit_outcome(recipe, store, tables, phase.say):
                finished.add(recipe.id)
        running = [(recipe, note) for recipe in recipes if (note := _read_progress(store, recipe))]
        done = sum(recipe.optimisation.steps for recipe in recipes if recipe.id in finished)
        shown = (f"{brief(recipe)} {note['step']:,}: loss {note['loss']:.4f}" for recipe, note in running)
        phase.set(done + sum(note["step"] for _, note in running), "; ".join(shown))

    def look_now_and_then() -> None:
        if cadence.due():
            with cadence.measured(), suppress(UnreachableError):
                look()

    def on_report(report: dict[str, Any]) -> None:
        if "lost" in report:
            raise UserError(f"a training run was lost: {report['lost']}")
        errors.update(report["errors"])

    lanes = [tuple(recipe.model_dump_json() for recipe in lane) for lane in lanes_of(recipes, slots.count)]
    work = [asdict(Lane(lane, store.address, slots.threads, slots.gpu > 0, checkpoint_seconds)) for lane in lanes]
    for recipe in recipes:  # another run, another try
        _Attempts.forget(store, recipe)
    look()  # once before it is timed, for what it imports
    cadence = _Cadence(PROGRESS_SECONDS)
    launch = partial(_launch, cpus=slots.cpus, gpu=slots.gpu)
    died = run_trials(launch, "work", work, on_report, on_step=look_now_and_then, concurrent=slots.count, reuse=False)
    look()
    store.clear_scratch()
    if died:  # its lane's CPUs are never given back, so others might wait for them for ever
        on_report({"lost": explain(died[0])})
    return [Failure(describe(recipe), errors[recipe.id]) for recipe in recipes if recipe.id in errors.keys() - finished]


def lanes_of(recipes: Sequence[Job], count: int) -> list[list[Job]]:
    """The recipes in so many lanes of about the same work: the next longest always into the shortest lane."""
    lanes: list[list[Job]] = [[] for _ in range(min(count, len(recipes)))]
    work = [0] * len(lanes)
    for recipe in sorted(recipes, key=multiply_adds, reverse=True):
        shortest = work.index(min(work))
        lanes[shortest].append(recipe)
        work[shortest] += multiply_adds(recipe)
    return lanes


def compute_all(
    recipes: Sequence[Fisher | ImportLanguage], store: Store, *, slots: Slots, phase: Phase
) -> list[Failure]:
    """Compute and commit all of them, an estimate with a training's part of a GPU; returns those that failed."""
    import ray

    failures: list[Failure] = []
    task = ray.remote(num_cpus=1, max_retries=MAX_FAILURES)(_compute)
    gpus = {recipe.id: slots.gpu if isinstance(recipe, Fisher) else 0 for recipe in recipes}
    place = {
        task.options(num_gpus=gpus[recipe.id]).remote(recipe, store.address, gpus[recipe.id] > 0): recipe
        for recipe in recipes
    }
    waiting = list(place)
    while waiting:
        (reference,), waiting = ray.wait(waiting)
        recipe = place.pop(reference)
        try:
            ray.get(reference)
        except ray.exceptions.RayError as error:
            failures.append(Failure(describe(recipe), explain(error)))
        phase.advance(1, describe(recipe))
    return failures


def _compute(recipe: Fisher | ImportLanguage, results: str, on_gpu: bool) -> None:
    """In a Ray task: make it and commit it, for two that commit the same write the same; its row first, for nobody
    would write that once it is there."""
    import torch

    from orchestrator.making import compute

    torch.set_num_threads(1)
    store, started, clock = Store(results), datetime.now(UTC), time.perf_counter()
    device, gpu = _device(on_gpu)
    made = compute(recipe, store, device)
    row = run_row(recipe, started, time.perf_counter() - clock, threads=1, precision="float32", gpu=gpu)
    Tables(store.tables, store.place).append("runs", recipe.id, run_rows(row))
    store.save(recipe, made)


def commit_outcome(recipe: Job, store: Store, tables: Tables, say: Callable[[str], None]) -> bool:
    """Commit what a finished training left under `training/<id>/`, if it did; a kill in between is made good next time.

    Policy first, then rows, then the folder goes: as long as it is there, the outcome can be committed again. Says so
    when the tables' rows are of an earlier training of the recipe (its artefact was deleted, or left elsewhere), and
    this one came out otherwise: scores from now on are not those of the policy before.
    """
    from dt.model.size import Size

    outcome = store.adopt_trained(recipe)
    if outcome is None:
        return False
    curve = training_rows(recipe, outcome["metrics"])
    if not tables.append("training", recipe.id, curve) and not _same_curve(curve, recipe, tables):
        say(
            f"{describe(recipe)} was trained before, and came out otherwise this time: machines round differently. "
            "Its rows are of the earlier training; do not compare what is evaluated now with what was then"
        )
    if not isinstance(recipe, Pretrain):
        tables.append("policies", recipe.id, policy_row(recipe, Size(**outcome["size"])))
    tables.append("runs", recipe.id, run_rows(outcome["run"]))
    store.discard_training(recipe)
    return True


def _same_curve(curve: pa.Table, recipe: Job, tables: Tables) -> bool:
    """Whether a training's losses are, to the last bit, those in the tables."""
    import pyarrow.compute as pc

    stated = tables.some("training", where=pc.field("policy") == recipe.id).sort_by("step")
    return bool(curve.sort_by("step")["loss"].equals(stated["loss"]))


def _read_progress(store: Store, recipe: Job) -> dict[str, Any] | None:
    try:
        progress: dict[str, Any] = json.loads((store.training_path(recipe) / PROGRESS).read_text())
    except (OSError, ValueError):  # not begun, or committed and gone
        return None
    return progress


# --- in the Tune trial ------------------------------------------------------------------------------------------------


def _launch(config: dict[str, Any], cpus: float, gpu: float) -> None:
    """Run one lane with Ray Train and report what in it failed, by recipe."""
    from ray import tune
    from ray.train import FailureConfig, RunConfig, ScalingConfig, TrainingFailedError
    from ray.train.torch import TorchTrainer

    os.environ.update({name: value for name, value in _ENVIRONMENT.items() if name not in os.environ})
    work = Lane(**config["work"])
    recipes = [_JOB.validate_json(recipe) for recipe in work.recipes]
    trainer = TorchTrainer(
        train_lane,  # type: ignore[arg-type]  # what it returns is the result's return_value
        train_loop_config=config["work"],
        scaling_config=ScalingConfig(
            num_workers=1, use_gpu=gpu > 0, resources_per_worker={"CPU": cpus} | ({"GPU": gpu} if gpu > 0 else {})
        ),
        run_config=RunConfig(
            name=recipes[0].id,
            storage_path=Store(work.results).scratch,
            failure_config=FailureConfig(max_failures=(MAX_ATTEMPTS + 1) * len(recipes)),  # the recipes' own come first
        ),
    )
    try:
        errors = trainer.fit().return_value  # type: ignore[attr-defined]
    except TrainingFailedError as failure:
        causes = getattr(failure, "worker_failures", {})
        reason = explain(next(iter(causes.values()), failure))
        attempts = {recipe.id: _Attempts.read(Store(work.results), recipe) for recipe in recipes}
        errors = {recipe: each.mistake or (reason if each.count else NOT_BEGUN) for recipe, each in attempts.items()}
    except Exception as failure:
        # The controller died (of memory, say). Without a dashboard its CPUs are never given back and other trainings
        # might wait for them for ever: the run ends, and with it the embedded Ray.
        tune.report({"lost": explain(failure)})
        return
    tune.report({"errors": errors})


# --- in the training worker -------------------------------------------------------------------------------------------


def train_lane(config: dict[str, Any]) -> dict[str, str]:
    """Train the lane to its end. Returns the mistakes of the user, by recipe, as sentences: raised, they would be tried
    again. After the death of a worker the next one begins here, too: it skips what is finished."""
    from dt.memory import keep_freed_memory

    keep_freed_memory()
    work = Lane(**config)
    store, errors = Store(work.results), dict[str, str]()
    for recipe in map(_JOB.validate_json, work.recipes):
        if store.has(recipe) or store.finished(recipe):
            continue
        try:
            with _attempt(recipe, store):
                _train(recipe, store, work)
        except UnreachableError:
            raise  # the next attempt may reach it
        except UserError as error:
            errors[recipe.id] = str(error)
    return errors


def _train(recipe: Job, store: Store, work: Lane) -> None:
    import torch

    from dt.language.model import LanguageModel
    from dt.model.size import size_of
    from dt.training.loop import run
    from orchestrator.making import begin, finish

    torch.set_num_threads(work.threads)
    device, gpu = _device(work.gpu)
    folder = store.training_path(recipe)
    store.place.fetch(folder)
    begun: TrainingState[Any] = begin(recipe, store, device)
    state_file, log = _resumed(folder)
    cadence, progress = _Cadence(work.checkpoint_seconds), _Cadence(PROGRESS_SECONDS)
    for state in run(begun, resume=state_file, log_every=LOG_EVERY):
        log.add(state)
        if progress.due():
            with progress.measured():
                _note(folder / PROGRESS, json.dumps({"step": state.step, "loss": state.metrics["loss"]}), store.place)
        if not state.done and cadence.due():
            with cadence.measured():
                store.place.put(folder / _LOG, log.to_json())  # first: `_Log.add` drops what is ahead of the state
                state.save(folder / _STATE)
                store.place.push(folder / _STATE)
                replace(_Attempts.read(store, recipe), ends=()).write(store, recipe)
    made = finish(recipe, begun.result())
    ran = run_row(
        recipe, log.started, log.seconds, threads=work.threads, precision=recipe.optimisation.precision, gpu=gpu
    )
    size = None if isinstance(made, LanguageModel) else size_of(made).model_dump()
    store.save_trained(recipe, made, {"metrics": log.metrics, "size": size, "run": ran})


def _device(on_gpu: bool) -> tuple[str, str | None]:
    """Where torch is to compute, and that GPU's name."""
    import torch

    return ("cuda", torch.cuda.get_device_name()) if on_gpu else ("cpu", None)


@dataclass(frozen=True)
class _Attempts:
    """What became of the attempts at a recipe in this run; kept in its folder, for a lane outlives its workers."""

    count: int = 0
    ends: tuple[str, ...] = ()  # why those since the last checkpoint ended
    mistake: str | None = None  # of the user

    @classmethod
    def read(cls, store: Store, recipe: Job) -> _Attempts:
        file = store.training_path(recipe) / _ATTEMPTS
        if not store.place.exists(file):  # though an earlier one may be in this machine's mirror
            return cls()
        store.place.fetch(file)
        saved: dict[str, Any] = json.loads(file.read_text())
        return cls(saved["count"], tuple(saved["ends"]), saved["mistake"])

    def write(self, store: Store, recipe: Job) -> None:
        store.place.put(store.training_path(recipe) / _ATTEMPTS, json.dumps(asdict(self)).encode())

    @staticmethod
    def forget(store: Store, recipe: Job) -> None:
        """It went well, or another run tries again."""
        store.place.remove(store.training_path(recipe) / _ATTEMPTS)


@contextmanager
def _attempt(recipe: Job, store: Store) -> Iterator[None]:
    """Keep the books of one attempt; of a death, what was written before it stays.

    Raises UserError for a mistake that an earlier attempt met, and when the recipe has killed too many workers: others
    wait for theirs.
    """
    before = _Attempts.read(store, recipe)
    if before.mistake is not None:
        raise UserError(before.mistake)
    if len(before.ends) > MAX_FAILURES or before.count >= MAX_ATTEMPTS:
        last = before.ends[-1] if before.ends else DEATH
        raise UserError(f"it was begun {before.count} times, the last time ended by {last}")
    begun = replace(before, count=before.count + 1, ends=(*before.ends, DEATH))
    begun.write(store, recipe)
    try:
        yield
    except Exception as error:
        if isinstance(error, UserError) and not isinstance(error, UnreachableError):
            replace(begun, mistake=str(error)).write(store, recipe)
            raise
        now = _Attempts.read(store, recipe)  # fewer ends, if there was a checkpoint
        replace(now, ends=(*now.ends[:-1], explain(error))).write(store, recipe)
        raise
    _Attempts.forget(store, recipe)


def _note(path: Path, text: str, place: Place) -> None:
    """Write a file that only a progress bar reads: whole, but not worth an error or a wait for the disk."""
    temporary = path.with_name(f".{path.name}.tmp")
    with suppress(OSError, UserError):
        temporary.write_text(text)
        temporary.replace(path)
        place.push(path)


class _Log:
    """The rows of a training so far, and how long it took; kept beside the state, so that a resume repeats none."""

    def __init__(self, metrics: list[dict[str, float]], started: datetime, seconds: float) -> None:
        self.metrics, self.started = metrics, started
        self._seconds_before, self._clock = seconds, time.perf_counter()

    @classmethod
    def from_json(cls, text: str) -> _Log:
        """The inverse of `to_json`."""
        saved: dict[str, Any] = json.loads(text)
        return cls(saved["metrics"], datetime.fromisoformat(saved["started"]), saved["seconds"])

    def to_json(self) -> bytes:
        """All of it, for the checkpoint."""
        saved = {"metrics": self.metrics, "started": self.started.isoformat(), "seconds": self.seconds}
        return json.dumps(saved).encode()

    def add(self, state: TrainingState[Any]) -> None:
        """One more row, in the place of those that a kill left ahead of the saved state."""
        while self.metrics and self.metrics[-1]["step"] >= state.step:
            self.metrics.pop()
        self.metrics.append(dict(state.metrics))

    @property
    def seconds(self) -> float:
        """Wall time of this attempt and of those it continues."""
        return self._seconds_before + time.perf_counter() - self._clock


def _resumed(folder: Path) -> tuple[Path | None, _Log]:
    """The state and the log to go on from: of the recipe's last checkpoint, or none and an empty log."""
    if not (folder / _STATE).is_file():
        return None, _Log([], datetime.now(UTC), 0.0)
    return folder / _STATE, _Log.from_json((folder / _LOG).read_text())


class _Cadence:
    """When to write a checkpoint or a note: every so many seconds, or more rarely where writing one takes long."""

    def __init__(self, seconds: float) -> None:
        self._seconds, self._last = seconds, time.monotonic()

    def due(self) -> bool:
        """Whether it is time."""
        return time.monotonic() - self._last >= self._seconds

    @contextmanager
    def measured(self) -> Iterator[None]:
        """Round the writing: no more than a twentieth of the time shall go into it."""
        began = time.monotonic()
        yield
        self._last = time.monotonic()
        self._seconds = max(self._seconds, 20 * (self._last - began))
