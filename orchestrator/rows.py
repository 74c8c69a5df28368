"""Recipes and their results as rows of the tables."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from dt.scores import normalised_score
from dt.tasks import get_task
from orchestrator.plan import trained
from orchestrator.recipes import Evaluate, Imported, Merge, Perturb, Recording, Train
from orchestrator.tables import SCHEMAS

if TYPE_CHECKING:
    from dt.model.policy import Policy
    from dt.rollout.evaluate import Episodes

STATISTICS = ("state_mean", "state_std", "best_return")  # in a head, but not trained


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


def training_rows(recipe: Train, metrics: Sequence[Mapping[str, float]]) -> pa.Table:
    """One row a logged step, for `training`."""
    constant = {"policy": recipe.id, "task": recipe.task}
    return pa.Table.from_pylist([constant | dict(row) for row in metrics], SCHEMAS["training"])


def policy_row(recipe: Train | Merge | Perturb, trunk_parameters: int, head_parameters: int) -> pa.Table:
    """The recipe unfolded into the columns a person filters by, for `policies`."""
    parts = list(dict.fromkeys(trained(recipe)))
    target = parts[0]
    dataset, architecture, optimisation = target.dataset, target.architecture, target.optimisation
    row: dict[str, Any] = {
        "policy": recipe.id,
        "kind": recipe.kind,
        "task": target.task,
        "source_tasks": "+".join(part.task for part in parts),
        "sources": "+".join(part.id for part in parts),
        "quality": dataset.quality,
        "dataset": dataset.source if isinstance(dataset, Imported) else "recorded",
        "recorded_episodes": dataset.episodes if isinstance(dataset, Recording) else None,
        "group": None if isinstance(recipe, Train) else recipe.group,
        "alpha": recipe.alpha if isinstance(recipe, Merge) else None,
        "method": _method(recipe),
        "initialisation": "random",
        "seed": target.seed,
        "perturbation_seed": recipe.seed if isinstance(recipe, Perturb) and recipe.how == "random" else None,
        **architecture.model_dump(),
        **optimisation.model_dump(),
        "trunk_parameters": trunk_parameters,
        "head_parameters": head_parameters,
        "recipe": recipe.canonical_json(),
    }
    return pa.Table.from_pylist([row], SCHEMAS["policies"])


def parameter_counts(policy: Policy, task: str) -> tuple[int, int]:
    """(of the trunk, of the task's head); statistics of the data are no parameters."""
    head = policy.heads[task]
    return (
        sum(tensor.numel() for tensor in policy.trunk.values()),
        sum(tensor.numel() for name, tensor in head.items() if name not in STATISTICS),
    )


def run_row(
    recipe: Recording | Train | Evaluate,
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
        **_machine(),
    }


def run_rows(row: Mapping[str, Any]) -> pa.Table:
    """`run_row`'s result, which travels as JSON, in the table's types."""
    return pa.Table.from_pylist([{**row, "started": datetime.fromisoformat(row["started"])}], SCHEMAS["runs"])


def _method(recipe: Train | Merge | Perturb) -> str | None:
    match recipe:
        case Merge():
            return "mean" if recipe.alpha is None else "interpolate"
        case Perturb():
            return recipe.how
        case Train():
            return None


@cache
def _machine() -> dict[str, Any]:
    versions = {name: _version(name) for name in ("mergedt", "torch", "ray", "mujoco", "gymnasium")}
    return {"host": platform.node(), "cpus": os.cpu_count(), **versions}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:  # run from a checkout that is not installed
        return None
