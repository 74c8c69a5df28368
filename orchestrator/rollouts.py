"""The pool of rollout actors: policies are merged where they are evaluated, weights travel once."""

from __future__ import annotations

import asyncio
import time
import warnings
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import ray
from numpy.typing import NDArray
from ray.exceptions import ActorUnavailableError, RayError, RayTaskError

from dt.tasks import get_task
from orchestrator.making import realise
from orchestrator.messages import Failure, describe, explain
from orchestrator.recipes import Evaluate, Fisher, Trained, ingredients
from orchestrator.rows import episode_rows, policy_row, run_row, run_rows

if TYPE_CHECKING:
    from dt.merging.merge import Fisher as FisherEstimate
    from dt.model.policy import Policy
    from dt.model.size import Size
    from dt.rollout.evaluate import Episodes
    from orchestrator.making import Made

Weights = Mapping[str, NDArray[np.float32] | NDArray[np.uint8]]
Sent = tuple[Trained | Fisher, "ray.ObjectRef[Weights]"]
WORKER_CPUS = 0.97  # of an actor that uses one: were they to hold all CPUs of a node, Tune's trials would never start

MAX_TRIES = 3  # of an evaluation whose worker answers no more; each of them lets Ray start its process three times
RETRY_SECONDS = 5.0  # between two calls to a worker that does not answer


@dataclass(frozen=True)
class Rows:
    """What one evaluation gave, as rows of the tables of that name."""

    evaluation: str
    episodes: pa.Table
    policies: pa.Table
    runs: pa.Table


def roll_out(evaluation: Evaluate, made: Made) -> Rows:
    """The rows of an evaluation, on one thread."""
    from dt.model.size import size_of
    from dt.rollout.evaluate import evaluate

    started, clock = datetime.now(UTC), time.perf_counter()
    policy = realise(evaluation.policy, made)
    episodes = evaluate(
        policy,
        get_task(evaluation.task),
        episodes=evaluation.episodes,
        seed=evaluation.seed,
        target_return=evaluation.target_return,
        precision=evaluation.precision,
    )
    return rows_of(evaluation, episodes, size_of(policy), started, time.perf_counter() - clock)


def rows_of(evaluation: Evaluate, episodes: Episodes, size: Size, started: datetime, seconds: float) -> Rows:
    """What one evaluation gave and took, on one thread."""
    return Rows(
        evaluation.id,
        episode_rows(evaluation, episodes),
        policy_row(evaluation.policy, size),
        run_rows(run_row(evaluation, started, seconds, threads=1, precision=evaluation.precision)),
    )


@ray.remote(num_cpus=WORKER_CPUS, max_restarts=-1, max_task_retries=2)
class RolloutWorker:
    """One process that rolls out policies on one thread. Its state is a cache only, so a restart changes no number."""

    def __init__(self) -> None:
        import torch

        from dt.memory import keep_freed_memory

        torch.set_num_threads(1)
        keep_freed_memory()
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")  # and we never write to it
        self._made: dict[str, Policy | FisherEstimate] = {}

    def ready(self) -> None:
        """Returns once the process lives."""

    def evaluate(self, evaluation: Evaluate, weights: Mapping[str, Sent]) -> Rows:
        """The rows of an evaluation whose policy is made of those ingredients."""
        import torch

        from dt.model.policy import Policy

        for recipe_id, (recipe, reference) in weights.items():
            if recipe_id not in self._made:
                arrays = ray.get(reference)
                self._made[recipe_id] = (
                    {name: torch.from_numpy(array) for name, array in arrays.items()}
                    if isinstance(recipe, Fisher)
                    else Policy.from_arrays(arrays, recipe.architecture)
                )
        return roll_out(evaluation, self._made)


@ray.remote(num_cpus=0)
class RolloutPool:
    """Hands evaluations to the workers, actors of that class, as they become idle. A sweep's trials share one pool."""

    def __init__(self, weights: Mapping[str, Sent], worker: Any) -> None:
        self._weights, self._worker = weights, worker
        self._idle: asyncio.Queue[Any] = asyncio.Queue()  # of workers; of an error, if none could start
        self._living = 0  # workers that are idle, at work, or starting
        self._returning: set[asyncio.Task[None]] = set()  # kept: asyncio itself holds its tasks weakly

    async def recruit(self, workers: int) -> None:
        """Start so many workers. Each gets work as soon as it lives, so one that finds no CPU yet holds nothing up."""
        self._living += workers
        await asyncio.gather(*(self._welcome(self._worker.remote()) for _ in range(workers)))

    async def _welcome(self, worker: Any) -> None:
        """Give it work once it answers. The rest do without one that never will; the last one's error is everyone's."""
        try:
            while True:
                with suppress(ActorUnavailableError):
                    await worker.ready.remote()
                    break
                await asyncio.sleep(RETRY_SECONDS)
        except RayError as error:
            self._living -= 1
            if not self._living:
                self._idle.put_nowait(error)
        else:
            self._idle.put_nowait(worker)

    def _welcome_back(self, worker: Any) -> None:
        """Welcome a worker whose process ended, once Ray has started it afresh, here or elsewhere."""
        task = asyncio.create_task(self._welcome(worker))
        self._returning.add(task)
        task.add_done_callback(self._returning.discard)

    async def evaluate(self, evaluation: Evaluate) -> Rows | Failure:
        """The evaluation's rows; or, should it kill its worker or raise, its failure.

        A worker that stands still, or cannot be reached, is no fault of the evaluation: another one does it.
        """
        needed = {part.id: self._weights[part.id] for part in ingredients(evaluation)}
        failure: RayError | None = None
        for _ in range(MAX_TRIES):
            worker = await self._idle.get()
            if isinstance(worker, RayError):  # there are no others
                self._idle.put_nowait(worker)
                failure = worker
                break
            try:
                rows: Rows = await worker.evaluate.remote(evaluation, needed)
            except ActorUnavailableError as error:  # or it died again and again: Ray says the same of both
                failure = error
                ray.kill(worker, no_restart=False)
                self._welcome_back(worker)
            except RayTaskError as error:
                failure = error
                self._idle.put_nowait(worker)
                break
            except RayError as error:
                failure = error
                self._welcome_back(worker)
                break
            else:
                self._idle.put_nowait(worker)
                return rows
        assert failure is not None
        return Failure(describe(evaluation), explain(failure))
