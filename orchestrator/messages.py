"""Recipes and errors in a few words."""

from __future__ import annotations

from dataclasses import dataclass

from ray.exceptions import (
    LocalRayletDiedError,
    NodeDiedError,
    ObjectLostError,
    OutOfMemoryError,
    RayActorError,
    RayTaskError,
    WorkerCrashedError,
)

from dt.errors import UserError
from orchestrator.recipes import (
    Assemble,
    Evaluate,
    FineTune,
    Fisher,
    ImportLanguage,
    Job,
    Merge,
    Perturb,
    Pretrain,
    Recipe,
    Train,
    TrainTogether,
    Vote,
)

_DEATHS = (
    LocalRayletDiedError,
    NodeDiedError,
    ObjectLostError,
    OutOfMemoryError,
    RayActorError,
    WorkerCrashedError,
)


@dataclass(frozen=True)
class Failure:
    """What could not be computed, and why, in one sentence."""

    what: str
    why: str


def describe(recipe: Recipe) -> str:
    """A recipe in a few words, for messages."""
    match recipe:
        case Train():
            quality = f"{recipe.dataset.quality} " if recipe.dataset.quality else ""
            start = f" begun as {describe(recipe.language)}" if recipe.language else ""
            return f"the {quality}{recipe.task} policy of seed {recipe.seed}{start}"
        case TrainTogether():
            method = "HarmoDT" if recipe.harmony else "multi-task"
            return f"the {method} policy of seed {recipe.seed} for {recipe.task}"
        case FineTune():
            return f"{describe(recipe.policy)} fine-tuned on {recipe.task} with seed {recipe.seed}"
        case Merge():
            weight = "" if recipe.alpha is None else f" at alpha {recipe.alpha:g}"
            weight = " by Fisher" if recipe.fisher else weight
            return f"{' with '.join(describe(source) for source in recipe.sources)} merged in {recipe.group}{weight}"
        case Perturb():
            return f"{describe(recipe.policy)} with {recipe.how} {recipe.group}"
        case Assemble():
            return f"{' and '.join(describe(part) for part in recipe.policies)} in one policy"
        case Vote():
            return f"the trunk that {recipe.threshold} tasks' masks share of {describe(recipe.policy)}"
        case Fisher():
            return f"the {recipe.variant} Fisher of {describe(recipe.policy)}"
        case Pretrain():
            return f"the language model of seed {recipe.seed} trained on {recipe.corpus}"
        case ImportLanguage():
            return f"the language model {recipe.source}"
        case Evaluate():
            return f"the evaluation {recipe.id} on {recipe.task} of {describe(recipe.policy)}"
        case _:
            return f"the recipe {recipe.id}"


def brief(training: Job) -> str:
    """A training in a word, for those who watch it run."""
    return "language" if isinstance(training, Pretrain) else training.task


def explain(error: BaseException) -> str:
    """What went wrong on a worker, in one sentence."""
    cause = error.cause if isinstance(error, RayTaskError) else error
    if isinstance(cause, UserError):
        return str(cause)
    if isinstance(cause, RayActorError) and cause.actor_init_failed:  # its text ends with the error that was raised
        return str(cause).strip().splitlines()[-1]
    if isinstance(cause, _DEATHS):
        return "its process died (of memory? with its machine?): run the same command again"
    lines = str(cause).strip().splitlines()
    return f"{type(cause).__name__}: {lines[0] if lines else 'no message'}"
