"""Training on Ray Train: one `TorchTrainer` a recipe, named by the recipe's id, launched from a thin Tune trial.
Fisher estimates and imports of language models take no steps and run as plain Ray tasks.

The worker keeps checkpoints under `training/<id>/` and, when it is through, leaves the policy and its rows there; the
driver alone moves them into the store and the tables. A run that is killed, anywhere, goes on from its last checkpoint.
"""

from __future__ import annotations

import json
import os
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence, Set
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field, TypeAdapter

from dt.errors import UserError
from orchestrator.messages import Failure, describe, explain
from orchestrator.progress import Phase
from orchestrator.recipes import Fisher, ImportLanguage, Job, Pretrain
from orchestrator.rows import policy_row, run_row, run_rows, training_rows
from orchestrator.store import Store, write_atomically
from orchestrator.tables import Tables

if TYPE_CHECKING:
    from dt.training.loop import TrainingState

LOG_EVERY = 50  # optimiser steps between two rows of the table `training`
MAX_FAILURES = 3  # lost workers a run survives; a mistake of the user is not tried again
PROGRESS_SECONDS = 2.0
_JOB: TypeAdapter[Job] = TypeAdapter(Annotated[Job, Field(discriminator="kind")])
_STATE, _LOG, _PROGRESS = "state.safetensors", "log.json", "progress.json"

_ENVIRONMENT = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "1",  # a checkpoint waits for the controller's next look: 2 s by default
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
class _Work:
    """What a training worker has to know; travels as JSON."""

    recipe: str
    results: str
    threads: int
    gpu: bool
    checkpoint_seconds: float


def train_all(
    recipes: Sequence[Job], store: Store, tables: Tables, *, slots: Slots, checkpoint_seconds: float, phase: Phase
) -> list[Failure]:
    """Train and commit all of them; returns those that failed."""
    from orchestrator.tuning import run_trials

    by_id = {recipe.id: recipe for recipe in recipes}
    for recipe in recipes:
        if not can_resume(store.training_path(recipe)):
            store.discard_training(recipe)
    finished: set[str] = set()
    failures: list[Failure] = []

    def on_report(report: dict[str, Any]) -> None:
        if "lost" in report:
            raise UserError(f"{describe(by_id[report['lost']])}: {report['why']}; run the same command again to go on")
        recipe = by_id[report["finished"]]
        if report["error"]:
            failures.append(Failure(recipe.id, describe(recipe), report["error"]))
        else:
            commit_outcome(recipe, store, tables)
            finished.add(recipe.id)

    work = [
        asdict(_Work(recipe.model_dump_json(), str(store.root), slots.threads, slots.gpu > 0, checkpoint_seconds))
        for recipe in recipes
    ]
    launch = partial(_launch, cpus=slots.cpus, gpu=slots.gpu)
    with _watched(recipes, finished, store, phase):
        died = run_trials(launch, "work", work, on_report, concurrent=slots.count, reuse=False)
    return [*failures, *(Failure("", "a training", explain(error)) for error in died)]


def compute_all(
    recipes: Sequence[Fisher | ImportLanguage], store: Store, tables: Tables, *, phase: Phase
) -> list[Failure]:
    """Compute and commit all of them; returns those that failed."""
    import ray

    failures: list[Failure] = []
    task = ray.remote(num_cpus=1, max_retries=MAX_FAILURES)(_compute)
    place = {task.remote(recipe, str(store.root)): recipe for recipe in recipes}
    waiting = list(place)
    while waiting:
        (reference,), waiting = ray.wait(waiting)
        recipe = place.pop(reference)
        try:
            run = ray.get(reference)
        except ray.exceptions.RayError as error:
            failures.append(Failure(recipe.id, describe(recipe), explain(error)))
        else:
            tables.append("runs", recipe.id, run_rows(run))
        phase.advance(1, describe(recipe))
    return failures


def _compute(recipe: Fisher | ImportLanguage, results: str) -> dict[str, Any]:
    """In a Ray task: make it and commit it, for two that commit the same write the same."""
    import torch

    from orchestrator.making import compute

    torch.set_num_threads(1)
    store, started, clock = Store(Path(results)), datetime.now(UTC), time.perf_counter()
    store.save(recipe, compute(recipe, store))
    return run_row(recipe, started, time.perf_counter() - clock, threads=1, precision="float32")


def commit_outcome(recipe: Job, store: Store, tables: Tables) -> bool:
    """Commit what a finished training left under `training/<id>/`, if it did; a kill in between is made good next time.

    Policy first, then rows, then the folder goes: as long as it is there, the outcome can be committed again.
    """
    from dt.model.size import Size

    outcome = store.adopt_trained(recipe)
    if outcome is None:
        return False
    tables.append("training", recipe.id, training_rows(recipe, outcome["metrics"]))
    if not isinstance(recipe, Pretrain):
        tables.append("policies", recipe.id, policy_row(recipe, Size(**outcome["size"])))
    tables.append("runs", recipe.id, run_rows(outcome["run"]))
    store.discard_training(recipe)
    return True


def can_resume(folder: Path) -> bool:
    """Whether Ray Train will go on from what is there. A kill while it wrote its snapshot, in place, leaves half of it
    or one that names a checkpoint already gone; it would refuse that for ever."""
    snapshot = folder / "checkpoint_manager_snapshot.json"
    if not snapshot.is_file():
        return True
    try:
        results = json.loads(snapshot.read_text())["checkpoint_results"]
        return all((folder / result["checkpoint_dir_name"]).is_dir() for result in results)
    except (ValueError, KeyError, TypeError):
        return False


@contextmanager
def _watched(recipes: Sequence[Job], finished: Set[str], store: Store, phase: Phase) -> Iterator[None]:
    """Show the steps that the workers note in their folders. Through Ray this would take an actor for each training."""

    def show() -> None:
        running = [note for recipe in recipes if (note := _read_progress(store, recipe))]
        done = sum(recipe.optimisation.steps for recipe in recipes if recipe.id in finished)
        losses = ", ".join(f"{note['loss']:.4f}" for note in running)
        phase.set(done + sum(note["step"] for note in running), f"loss {losses}" if losses else "")

    def watch() -> None:
        while not over.wait(PROGRESS_SECONDS):
            show()

    over = threading.Event()
    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        over.set()
        watcher.join()
        show()


def _read_progress(store: Store, recipe: Job) -> dict[str, Any] | None:
    try:
        progress: dict[str, Any] = json.loads((store.training_path(recipe) / _PROGRESS).read_text())
    except (OSError, ValueError):  # not begun, or committed and gone
        return None
    return progress


# --- in the Tune trial ------------------------------------------------------------------------------------------------


def _launch(config: dict[str, Any], cpus: float, gpu: float) -> None:
    """Run one training with Ray Train and report how it ended."""
    from ray import tune
    from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig, TrainingFailedError
    from ray.train.torch import TorchTrainer

    os.environ.update({name: value for name, value in _ENVIRONMENT.items() if name not in os.environ})
    work = _Work(**config["work"])
    recipe = _JOB.validate_json(work.recipe)
    trainer = TorchTrainer(
        _train_worker,  # type: ignore[arg-type]  # what it returns is the result's return_value
        train_loop_config=config["work"],
        scaling_config=ScalingConfig(
            num_workers=1, use_gpu=gpu > 0, resources_per_worker={"CPU": cpus} | ({"GPU": gpu} if gpu > 0 else {})
        ),
        run_config=RunConfig(
            name=recipe.id,
            storage_path=str(Store(Path(work.results)).training),
            failure_config=FailureConfig(max_failures=MAX_FAILURES),
            checkpoint_config=CheckpointConfig(num_to_keep=2),
        ),
    )
    try:
        error = trainer.fit().return_value  # type: ignore[attr-defined]
    except TrainingFailedError as failure:
        causes = getattr(failure, "worker_failures", {})
        error = explain(next(iter(causes.values()), failure))
    except Exception as failure:
        # The controller died (of memory, say). Without a dashboard its CPUs are never given back and other trainings
        # might wait for them for ever: the run ends, and with it the embedded Ray.
        tune.report({"lost": recipe.id, "why": explain(failure)})
        return
    tune.report({"finished": recipe.id, "error": error})


# --- in the training worker -------------------------------------------------------------------------------------------


def _train_worker(config: dict[str, Any]) -> str | None:
    """Train to the end. Returns a mistake of the user as a sentence: raised, it would be tried again."""
    try:
        _train(_Work(**config))
    except UserError as error:
        return str(error)
    return None


def _train(work: _Work) -> None:
    import ray.train
    import torch

    from dt.language.model import LanguageModel
    from dt.memory import keep_freed_memory
    from dt.model.size import size_of
    from dt.training.loop import run
    from orchestrator.making import begin, finish

    keep_freed_memory()
    recipe, store = _JOB.validate_json(work.recipe), Store(Path(work.results))
    torch.set_num_threads(work.threads)
    device, gpu = ("cuda", torch.cuda.get_device_name()) if work.gpu else ("cpu", None)
    begun: TrainingState[Any] = begin(recipe, store, device)
    with _resumed() as (state_file, log):
        cadence, progress = _Cadence(work.checkpoint_seconds), _Cadence(PROGRESS_SECONDS)
        for state in run(begun, resume=state_file, log_every=LOG_EVERY):
            log.add(state)
            if progress.due():
                with progress.measured():
                    note = json.dumps({"step": state.step, "loss": state.metrics["loss"]})
                    _note(store.training_path(recipe) / _PROGRESS, note)
            if not state.done and cadence.due():
                with cadence.measured(), tempfile.TemporaryDirectory() as folder:
                    state.save(Path(folder, _STATE))
                    write_atomically(Path(folder, _LOG), log.to_json())
                    ray.train.report(
                        {"step": state.step, "loss": state.metrics["loss"]},
                        checkpoint=ray.train.Checkpoint.from_directory(folder),
                    )
    made = finish(recipe, begun.result())
    ran = run_row(
        recipe, log.started, log.seconds, threads=work.threads, precision=recipe.optimisation.precision, gpu=gpu
    )
    size = None if isinstance(made, LanguageModel) else size_of(made).model_dump()
    store.save_trained(recipe, made, {"metrics": log.metrics, "size": size, "run": ran})


def _note(path: Path, text: str) -> None:
    """Write a file that only a progress bar reads: whole, but not worth an error or a wait for the disk."""
    temporary = path.with_name(f".{path.name}.tmp")
    with suppress(OSError):
        temporary.write_text(text)
        temporary.replace(path)


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
        """One more row."""
        self.metrics.append(dict(state.metrics))

    @property
    def seconds(self) -> float:
        """Wall time of this attempt and of those it continues."""
        return self._seconds_before + time.perf_counter() - self._clock


@contextmanager
def _resumed() -> Iterator[tuple[Path | None, _Log]]:
    """The state and the log to go on from: of the last checkpoint Ray Train knows, or none and an empty log."""
    import ray.train

    checkpoint = ray.train.get_checkpoint()
    if checkpoint is None:
        yield None, _Log([], datetime.now(UTC), 0.0)
        return
    with checkpoint.as_directory() as folder:
        yield Path(folder, _STATE), _Log.from_json(Path(folder, _LOG).read_text())


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
