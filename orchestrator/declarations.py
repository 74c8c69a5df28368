"""Rows of what is known without a computation: which evaluations answer which experiment, the paper's numbers, and what
the datasets at hand hold."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from itertools import groupby
from typing import TYPE_CHECKING

import pyarrow as pa

from dt.errors import UserError
from orchestrator.experiment import Point
from orchestrator.paper import NUMBERS
from orchestrator.plan import is_recorded
from orchestrator.recipes import Dataset, Imported, Merge, Perturb, Recording, dataset_of, origin, trained
from orchestrator.store import Store
from orchestrator.tables import SCHEMAS, Tables

if TYPE_CHECKING:
    from dt.data.trajectories import Trajectories


def declare_paper(tables: Tables) -> None:
    """State the paper's numbers in the table `paper`."""
    for experiment, numbers in groupby(NUMBERS, key=lambda number: number.experiment):
        tables.append("paper", experiment, pa.Table.from_pylist([asdict(n) for n in numbers], SCHEMAS["paper"]))


def declare_experiment(tables: Tables, experiment: str, profile: str, points: Sequence[Point]) -> None:
    """State an experiment's points at a profile in the table `experiments`; the newest statement counts."""
    rows = [_row(experiment, profile, i, point) for i, point in enumerate(points)]
    tables.append("experiments", f"{experiment}-{profile}", pa.Table.from_pylist(rows, SCHEMAS["experiments"]))


def state_datasets(tables: Tables, store: Store, datasets: Iterable[Dataset]) -> None:
    """State what those datasets hold that are at hand, in the table `datasets`."""
    stated = tables.done("datasets")
    for dataset in {dataset.id: dataset for dataset in datasets}.values():
        if dataset.id not in stated and (data := _at_hand(dataset, store)):
            row = {
                "dataset": dataset.id,
                "task": dataset.task,
                "quality": dataset.quality,
                "source": dataset.source if isinstance(dataset, Imported) else "recorded",
                "episodes": data.episodes,
                "steps": data.steps,
                "mean_return": data.returns.mean(),
                "return_deviation": data.returns.std(),
                "best_return": data.returns.max(),
                "content": data.content_hash,
            }
            tables.append("datasets", dataset.id, pa.Table.from_pylist([row], SCHEMAS["datasets"]))


def _at_hand(dataset: Dataset, store: Store) -> Trajectories | None:
    """The dataset; None when it is not recorded yet, cannot be read, or has changed."""
    from orchestrator.making import load_dataset

    if isinstance(dataset, Recording) and not is_recorded(dataset, store):
        return None
    try:
        return load_dataset(dataset, store)
    except UserError:
        return None


def _row(experiment: str, profile: str, index: int, point: Point) -> dict[str, object]:
    policy = point.evaluation.policy
    parts = list(dict.fromkeys(trained(policy)))
    own = origin(policy, point.evaluation.task)
    return {
        "experiment": experiment,
        "profile": profile,
        "point": index,
        "evaluation": point.evaluation.id,
        "policy": policy.id,
        "task": point.evaluation.task,
        "target": parts[0].task if isinstance(policy, Merge) else None,
        "source": "+".join(part.task for part in parts[1:]) or None,
        "group": policy.group if isinstance(policy, Merge | Perturb) else None,
        "alpha": policy.alpha if isinstance(policy, Merge) else None,
        "dataset": dataset_of(own, point.evaluation.task).quality,
        "labels": json.dumps(point.labels, ensure_ascii=False),
    }
