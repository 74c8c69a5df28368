"""Training batches: random windows of K steps, left-padded, gathered from whole trajectories at once."""

from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt
import torch

from dt.data.trajectories import Trajectories
from dt.tasks import Task

T = TypeVar("T", bound=np.generic)


class Batch(NamedTuple):
    """B windows of K steps, oldest first. Where `mask` is False (on the left) there is no step and all is zero."""

    returns_to_go: torch.Tensor  # (B, K, 1) float32, divided by the task's return scale
    states: torch.Tensor  # (B, K, S) float32, normalised
    actions: torch.Tensor  # (B, K, A) float32
    timesteps: torch.Tensor  # (B, K) int64, steps since the episode began, at most horizon − 1
    mask: torch.Tensor  # (B, K) bool


@dataclass(frozen=True, eq=False)
class Windows:
    """Trajectories prepared for sampling. Every table ends with a row of zeros, which is what padding gathers."""

    context: int  # K
    returns_to_go: npt.NDArray[np.float32]  # (N + 1, 1)
    states: npt.NDArray[np.float32]  # (N + 1, S)
    actions: npt.NDArray[np.float32]  # (N + 1, A)
    timesteps: npt.NDArray[np.int64]  # (N + 1,)
    ends: npt.NDArray[np.int64]  # (N,) one past the last step of each step's episode

    @classmethod
    def of(
        cls,
        trajectories: Trajectories,
        task: Task,
        context: int,
        statistics: tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]] | None = None,
    ) -> "Windows":
        """Normalise the states, scale the returns, clip the time steps.

        statistics: mean and deviation (S,) of the states; None: the trajectories' own.
        """
        mean, deviation = statistics or (trajectories.state_mean, trajectories.state_std)
        lengths, offsets = trajectories.lengths, trajectories.offsets
        elapsed = np.arange(trajectories.steps) - np.repeat(offsets[:-1], lengths)
        states = (trajectories.observations - mean) / deviation
        return cls(
            context=context,
            returns_to_go=_padded(trajectories.returns_to_go[:, None] / np.float32(task.return_scale)),
            states=_padded(states),
            actions=_padded(trajectories.actions),
            timesteps=_padded(np.minimum(elapsed, task.horizon - 1)),
            ends=np.repeat(offsets[1:], lengths),
        )

    def sample(self, batch_size: int, rng: np.random.Generator, device: torch.device | str = "cpu") -> Batch:
        """Windows from uniformly drawn steps on, K steps long or to the end of the episode.

        That is the original code's draw: a trajectory in proportion to its length, then a uniform start in it.
        """
        rows, mask = self.draw(batch_size, rng)
        tables = (self.returns_to_go, self.states, self.actions, self.timesteps)
        return Batch(*(torch.from_numpy(array).to(device) for array in (*(table[rows] for table in tables), mask)))

    def draw(self, batch_size: int, rng: np.random.Generator) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
        """Which rows of the tables a sample gathers, and which of them are steps: (B, K) each."""
        padding_row = len(self.ends)
        starts = rng.integers(len(self.ends), size=batch_size)
        stops = np.minimum(starts + self.context, self.ends[starts])
        rows = stops[:, None] + np.arange(-self.context, 0)  # (B, K), right-aligned
        mask = rows >= starts[:, None]
        return np.where(mask, rows, padding_row), mask


def _padded(table: npt.NDArray[T]) -> npt.NDArray[T]:
    return np.concatenate([table, np.zeros_like(table, shape=(1, *table.shape[1:]))])
