"""Rows that are declared, not measured: which evaluations answer which experiment, and the paper's numbers."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from itertools import groupby

import pyarrow as pa

from orchestrator.experiment import Point
from orchestrator.paper import NUMBERS
from orchestrator.recipes import Merge, Perturb, dataset_of, origin, trained
from orchestrator.tables import SCHEMAS, Tables


def declare_paper(tables: Tables) -> None:
    """State the paper's numbers in the table `paper`."""
    for experiment, numbers in groupby(NUMBERS, key=lambda number: number.experiment):
        tables.append("paper", experiment, pa.Table.from_pylist([asdict(n) for n in numbers], SCHEMAS["paper"]))


def declare_experiment(tables: Tables, experiment: str, profile: str, points: Sequence[Point]) -> None:
    """State an experiment's points at a profile in the table `experiments`; the newest statement counts."""
    rows = [_row(experiment, profile, i, point) for i, point in enumerate(points)]
    tables.append("experiments", f"{experiment}-{profile}", pa.Table.from_pylist(rows, SCHEMAS["experiments"]))


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
