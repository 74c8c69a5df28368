"""Recipes and their results as rows of the tables."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import pyarrow as pa

from dt.model.size import Size
from dt.scores import normalised_score
from dt.tasks import get_task
from orchestrator.recipes import (
    AnyPolicy,
    Assemble,
    Evaluate,
    FineTune,
    Fisher,
    Imported,
    ImportLanguage,
    Job,
    Merge,
    Perturb,
    Pretrain,
    Recording,
    Train,
    Trained,
    TrainTogether,
    Vote,
    tasks_of,
    trained,
)
from orchestrator.tables import SCHEMAS

if TYPE_CHECKING:
    from dt.rollout.evaluate import Episodes

_PRODUCTS = ("amx_bf16", "avx512_bf16", "avx512f", "avx2")  # widest first


def episode_rows(evaluation: Evaluate, episodes: Episodes) -> pa.Table:
    """One row an episode, for `episodes`."""
    count = len(episodes.returns)
    target = evaluation.target_return
    constant = {
        "evaluation": evaluation.id,
        "policy": evaluation.policy.id,
        "task": evaluation.task,
        "target_return": None if target == "best" else target,
        "precision": evaluation.precision,
    }
    columns = {name: [value] * count for name, value in constant.items()} | {
        "episode": range(count),
        "environment_seed": episodes.seeds,
        "return": episodes.returns,
        "length": episodes.lengths,
        "terminated": episodes.terminated,
        "score": normalised_score(get_task(evaluation.task), episodes.returns),
    }
    schema = SCHEMAS["episodes"]
    return pa.Table.from_arrays([pa.array(columns[field.name], field.type) for field in schema], schema=schema)


def training_rows(recipe: Job, metrics: Sequence[Mapping[str, float]]) -> pa.Table:
    """One row a logged step, for `training`; what has no column there, as the loss of one task of several, is left."""
    constant = {"policy": recipe.id, "task": "language" if isinstance(recipe, Pretrain) else recipe.task}
    return pa.Table.from_pylist([constant | dict(row) for row in metrics], SCHEMAS["training"])


def policy_row(recipe: AnyPolicy, size: Size) -> pa.Table:
    """The recipe unfolded into the columns a person filters by, for `policies`."""
    parts = list(dict.fromkeys(trained(recipe)))
    target = parts[0]
    dataset, architecture, optimisation = target.datasets[0], target.architecture, target.optimisation
    merge, tuned = _within(recipe, Merge), _within(recipe, FineTune)
    auxiliaries = None if isinstance(target, TrainTogether) else target.auxiliaries
    whole = isinstance(recipe, Assemble | TrainTogether | Vote)
    row: dict[str, Any] = {
        "policy": recipe.id,
        "kind": recipe.kind,
        "task": "+".join(tasks_of(recipe)) if whole else tasks_of(recipe)[0],
        "source_tasks": "+".join(part.task for part in parts),
        "sources": "+".join(part.id for part in parts),
        "quality": dataset.quality,
        "dataset": dataset.source if isinstance(dataset, Imported) else "recorded",
        "recorded_episodes": dataset.episodes if isinstance(dataset, Recording) else None,
        "group": recipe.group if isinstance(recipe, Perturb) else merge.group if merge else None,
        "alpha": merge.alpha if merge else None,
        "method": _method(recipe, merge),
        "frozen": tuned.frozen if tuned else None,
        "initialisation": _initialisation(target),
        "cosine": auxiliaries.cosine if auxiliaries else 0.0,
        "co_training": auxiliaries.language if auxiliaries else 0.0,
        "distance": auxiliaries.distance if auxiliaries else 0.0,
        "seed": target.seed,
        "perturbation_seed": recipe.seed if isinstance(recipe, Perturb) and recipe.how == "random" else None,
        **architecture.model_dump(),
        **optimisation.model_dump(),
        "trunk_parameters": size.shared + size.specific,
        "head_parameters": size.heads,
        "specific_parameters": size.specific,
        "mask_bits": size.mask_bits,
        "transformer_size": size.transformer,
        "recipe": recipe.canonical_json(),
    }
    return pa.Table.from_pylist([row], SCHEMAS["policies"])


SIZES = ("trunk_parameters", "specific_parameters", "head_parameters", "mask_bits", "transformer_size")


def size_in(row: Mapping[str, Any]) -> Size:
    """The size that `policy_row` wrote, from those columns."""
    return Size(
        shared=row["trunk_parameters"] - row["specific_parameters"],
        specific=row["specific_parameters"],
        heads=row["head_parameters"],
        mask_bits=row["mask_bits"],
        transformer=row["transformer_size"],
    )


W = TypeVar("W", Merge, FineTune)


def _within(recipe: AnyPolicy, kind: type[W]) -> W | None:
    """The merge or fine-tuning nearest to the surface of a recipe, of its first task."""
    match recipe:
        case _ if isinstance(recipe, kind):
            return recipe
        case FineTune() | Vote():
            return _within(recipe.policy, kind)
        case Assemble():
            return _within(recipe.policies[0], kind)
        case _:
            return None


def _method(recipe: AnyPolicy, merge: Merge | None) -> str | None:
    match recipe:
        case Perturb():
            return recipe.how
        case Vote():
            return f"HarmoDT, {recipe.threshold} votes"
        case TrainTogether():
            return f"HarmoDT, {recipe.harmony.importance}" if recipe.harmony else "multi-task"
        case _ if merge is None:
            return None
        case _ if merge.fisher is not None:
            return f"Fisher, {merge.fisher.estimates[0].variant}"
        case _:
            return "mean" if merge.alpha is None else "interpolate"


def _initialisation(target: Trained) -> str:
    """What the first training behind a policy began from."""
    match target:
        case Train(language=Pretrain() as language):
            return f"pretrained on {language.corpus}"
        case Train(language=ImportLanguage() as language):
            return language.source
        case FineTune():
            return _initialisation(next(trained(target.policy)))
        case _:
            return "random"


def run_row(
    recipe: Recording | Job | Fisher | ImportLanguage | Evaluate,
    started: datetime,
    seconds: float,
    *,
    threads: int,
    precision: str | None,
    gpu: str | None = None,
) -> dict[str, Any]:
    """What ran where and for how long, for `runs`. Call it in the process that did the work."""
    return {
        "recipe": recipe.id,
        "kind": recipe.kind,
        "started": started.isoformat(),
        "seconds": seconds,
        "gpu": gpu,
        "threads": threads,
        "precision": precision,
        **machine(),
    }


def run_rows(row: Mapping[str, Any]) -> pa.Table:
    """`run_row`'s result, which travels as JSON, in the table's types."""
    return pa.Table.from_pylist([{**row, "started": datetime.fromisoformat(row["started"])}], SCHEMAS["runs"])


@cache
def machine() -> dict[str, Any]:
    """What the rows of `runs` and `benchmarks` say of this machine and its packages."""
    versions = {name: _version(name) for name in ("mergedt", "torch", "ray", "mujoco", "gymnasium")}
    return {"host": platform.node(), "processor": processor(), "cpus": os.cpu_count(), **versions}


@cache
def processor() -> str:
    """This machine's processor: its model, and the widest products it has, for those decide how sums are rounded."""
    try:
        first, *_ = Path("/proc/cpuinfo").read_text().split("\n\n")
    except OSError:  # not Linux
        return platform.processor() or platform.machine()
    fields = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in first.splitlines())}
    flags = fields.get("flags", "").split()
    widest = [flag for flag in _PRODUCTS if flag in flags][:1]
    return ", ".join([fields.get("model name", platform.machine()), *widest])


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:  # run from a checkout that is not installed
        return None
