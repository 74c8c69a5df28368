"""The pool of rollout actors: policies are merged where they are evaluated, weights travel once."""

from __future__ import annotations

import asyncio
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import ray
from numpy.typing import NDArray
from ray.exceptions import RayError, RayTaskError

from dt.errors import UserError
from dt.tasks import get_task
from orchestrator.plan import trained
from orchestrator.recipes import Evaluate, Merge, Perturb, Train
from orchestrator.rows import episode_rows, parameter_counts, policy_row, run_row, run_rows

if TYPE_CHECKING:
    from dt.model.policy import Policy

Weights = Mapping[str, NDArray[np.float32]]
WORKER_CPUS = 0.9  # of an actor that uses one: were they to hold all CPUs, Tune's trials would never start

# One. A recipe's result may depend on its recipe alone: a resume stacks only what is left. The rollouts give a policy
# the same bits in whatever company where oneDNN takes the products (see `dt.rollout.actor`), but not for toy widths nor
# on every machine; and on a CPU 25 episodes fill the caches: stacking 6 policies saved 15 % of the time at 10 episodes.
POLICIES_PER_JOB = 1


@dataclass(frozen=True)
class Rows:
    """What one evaluation gave, as rows of the tables of that name."""

    evaluation: str
    episodes: pa.Table
    policies: pa.Table
    runs: pa.Table


@dataclass(frozen=True)
class Failure:
    """A recipe that could not be computed, and why, in one sentence."""

    recipe: str
    what: str
    why: str


Job = tuple[Evaluate, ...]


def realise(recipe: Train | Merge | Perturb, experts: Mapping[str, Policy]) -> Policy:
    """The policy a recipe describes, made from trained ones by recipe id."""
    from dt.merging.merge import merge, perturb

    match recipe:
        case Train():
            return experts[recipe.id]
        case Merge():
            return merge([realise(source, experts) for source in recipe.sources], recipe.group, recipe.alpha)
        case Perturb():
            return perturb(realise(recipe.policy, experts), recipe.group, recipe.how, recipe.seed)


def evaluate_job(job: Job, experts: Mapping[str, Policy], threads: int) -> list[Rows]:
    """The rows of evaluations that differ in their policy only, all rolled out together."""
    from dt.rollout.evaluate import evaluate

    started, clock, first = datetime.now(UTC), time.perf_counter(), job[0]
    policies = [realise(evaluation.policy, experts) for evaluation in job]
    results = evaluate(
        policies,
        get_task(first.task),
        episodes=first.episodes,
        seed=first.seed,
        target_returns=first.target_return,
        precision=first.precision,
    )
    seconds = (time.perf_counter() - clock) / len(job)
    return [
        Rows(
            evaluation.id,
            episode_rows(evaluation, result),
            policy_row(evaluation.policy, *parameter_counts(policy, evaluation.task)),
            run_rows(run_row(evaluation, started, seconds, threads=threads, precision=evaluation.precision)),
        )
        for evaluation, policy, result in zip(job, policies, results, strict=True)
    ]


@ray.remote(num_cpus=WORKER_CPUS, max_restarts=-1, max_task_retries=2)
class RolloutWorker:
    """One process that rolls out policies on one thread. Its state is a cache only, so a restart changes no number."""

    def __init__(self) -> None:
        import torch

        torch.set_num_threads(1)
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")  # and we never write to it
        self._experts: dict[str, Policy] = {}

    def ready(self) -> None:
        """Returns once the process lives."""

    def evaluate(self, job: Job, weights: Mapping[str, tuple[Train, ray.ObjectRef[Weights]]]) -> list[Rows]:
        """The rows of a job whose policies are made of those trained ones."""
        from dt.model.policy import Policy

        for recipe_id, (recipe, reference) in weights.items():
            if recipe_id not in self._experts:
                self._experts[recipe_id] = Policy.from_arrays(ray.get(reference), recipe.architecture)
        return evaluate_job(job, self._experts, threads=1)


@ray.remote(num_cpus=0)
class RolloutPool:
    """Hands jobs to the workers as they become idle. All trials of a sweep share one pool."""

    def __init__(self, weights: Mapping[str, tuple[Train, ray.ObjectRef[Weights]]]) -> None:
        self._weights = weights
        self._idle: asyncio.Queue[Any] = asyncio.Queue()  # of workers; of an error, if one could not start

    async def recruit(self, workers: int) -> None:
        """Start so many workers. Each gets work as soon as it lives, so one that finds no CPU yet holds nothing up."""

        async def start() -> None:
            worker = RolloutWorker.remote()  # type: ignore[attr-defined]
            try:
                await worker.ready.remote()
            except RayError as error:
                self._idle.put_nowait(error)
            else:
                self._idle.put_nowait(worker)

        await asyncio.gather(*(start() for _ in range(workers)))

    async def evaluate(self, job: Job) -> list[Rows] | list[Failure]:
        """The job's rows; or, should it kill its worker or raise, a failure for each of its evaluations."""
        needed = {train.id: self._weights[train.id] for evaluation in job for train in trained(evaluation.policy)}
        worker = await self._idle.get()
        try:
            if isinstance(worker, RayError):
                raise worker
            rows: list[Rows] = await worker.evaluate.remote(job, needed)
            return rows
        except RayError as error:
            return [Failure(evaluation.id, describe(evaluation), explain(error)) for evaluation in job]
        finally:
            self._idle.put_nowait(worker)


def jobs_of(line: Sequence[Evaluate]) -> list[Job]:
    """A line cut into jobs."""
    return [tuple(line[start : start + POLICIES_PER_JOB]) for start in range(0, len(line), POLICIES_PER_JOB)]


def describe(recipe: Train | Merge | Perturb | Evaluate) -> str:
    """A recipe in a few words, for messages."""
    match recipe:
        case Train():
            quality = f"{recipe.dataset.quality} " if recipe.dataset.quality else ""
            return f"the {quality}{recipe.task} policy of seed {recipe.seed}"
        case Merge():
            weight = "" if recipe.alpha is None else f" at alpha {recipe.alpha:g}"
            return f"{' with '.join(describe(source) for source in recipe.sources)} merged in {recipe.group}{weight}"
        case Perturb():
            return f"{describe(recipe.policy)} with {recipe.how} {recipe.group}"
        case Evaluate():
            return f"the evaluation {recipe.id} on {recipe.task} of {describe(recipe.policy)}"


def explain(error: BaseException) -> str:
    """What went wrong on a worker, in one sentence."""
    cause = error.cause if isinstance(error, RayTaskError) else error
    if isinstance(cause, UserError):
        return str(cause)
    if isinstance(cause, RayError):
        return "its process died again and again (memory?)"
    lines = str(cause).strip().splitlines()
    return f"{type(cause).__name__}: {lines[0] if lines else 'no message'}"
