"""What a dataset holds, in a few numbers."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dt.data.trajectories import Trajectories
from dt.errors import UserError
from dt.scores import normalised_score
from dt.tasks import Task


@dataclass(frozen=True)
class Description:
    """The size of a dataset and the distribution of its episodes' undiscounted returns."""

    task: str
    episodes: int
    steps: int
    mean_length: float  # steps an episode
    terminated: int  # episodes that ended before the time limit
    return_min: float
    return_25: float  # quartiles
    return_50: float
    return_75: float
    return_max: float
    return_mean: float
    return_std: float  # over episodes
    score: float  # of the mean return
    content_hash: str


def describe(trajectories: Trajectories, task: Task) -> Description:
    """The description of a dataset of that task; it must hold an episode."""
    returns = trajectories.returns
    quartiles = (float(quantile) for quantile in np.quantile(returns, [0, 0.25, 0.5, 0.75, 1]))
    return_min, return_25, return_50, return_75, return_max = quartiles
    return Description(
        task=task.name,
        episodes=trajectories.episodes,
        steps=trajectories.steps,
        mean_length=trajectories.steps / trajectories.episodes,
        terminated=int(trajectories.terminated.sum()),
        return_min=return_min,
        return_25=return_25,
        return_50=return_50,
        return_75=return_75,
        return_max=return_max,
        return_mean=float(returns.mean()),
        return_std=float(returns.std()),
        score=normalised_score(task, float(returns.mean())),
        content_hash=trajectories.content_hash,
    )


@dataclass(frozen=True)
class RecordingEntry:
    """One recording on disk, as its metadata tells it: nothing of the data is read."""

    task: str
    quality: str
    episodes: int
    seed: int
    steps: int
    content_hash: str
    path: Path


def list_recordings(root: Path) -> tuple[RecordingEntry, ...]:
    """All recordings under a Minari root, by task, quality, episodes and seed. Raises UserError on damaged metadata."""
    entries = [_entry(file) for file in root.glob("mergedt/*/*/data/metadata.json")]
    return tuple(sorted(entries, key=lambda entry: (entry.task, entry.quality, entry.episodes, entry.seed)))


def _entry(file: Path) -> RecordingEntry:
    path = file.parent.parent
    try:
        metadata = json.loads(file.read_text(encoding="utf-8"))
        return RecordingEntry(
            **metadata["recording"], steps=metadata["total_steps"], content_hash=metadata["content_hash"], path=path
        )
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"the metadata of the recording at {path} cannot be read: delete it and record it again"
        ) from error
