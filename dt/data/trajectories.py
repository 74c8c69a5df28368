"""Offline data in memory: all episodes of one task end to end, in a few contiguous read-only arrays."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from dt.errors import UserError
from dt.tasks import Task

STD_FLOOR = 1e-6  # added to the standard deviation of the states, as the original code does


@dataclass(frozen=True, eq=False)
class Trajectories:
    """E episodes of N steps in all; episode e is the rows `offsets[e]:offsets[e + 1]`, at least one.

    The arrays are converted to the dtypes below and made read-only. Raises ValueError when the shapes contradict each
    other.
    """

    observations: npt.NDArray[np.float32]  # (N, S), as the environment gives them
    actions: npt.NDArray[np.float32]  # (N, A)
    rewards: npt.NDArray[np.float32]  # (N,)
    offsets: npt.NDArray[np.int64]  # (E + 1,), from 0 to N, strictly increasing
    terminated: npt.NDArray[np.bool_]  # (E,), False: cut by the time limit
    final_observations: npt.NDArray[np.float32] | None = None  # (E, S), after the last step, where the source has them

    def __post_init__(self) -> None:
        for name, dtype in _DTYPES.items():
            if (given := getattr(self, name)) is not None:
                array: npt.NDArray[Any] = np.ascontiguousarray(given, dtype).view()
                array.flags.writeable = False
                object.__setattr__(self, name, array)
        steps, episodes = len(self.rewards), len(self.offsets) - 1
        consistent = (
            self.observations.ndim == self.actions.ndim == 2
            and self.rewards.ndim == self.offsets.ndim == self.terminated.ndim == 1
            and len(self.observations) == len(self.actions) == steps
            and len(self.terminated) == episodes >= 0
            and self.offsets[0] == 0
            and self.offsets[-1] == steps
            and bool((np.diff(self.offsets) > 0).all())
            and (
                self.final_observations is None
                or self.final_observations.shape == (episodes, self.observations.shape[1])
            )
        )
        if not consistent:
            shapes = {name: None if (a := getattr(self, name)) is None else a.shape for name in _DTYPES}
            raise ValueError(f"trajectories whose arrays do not fit together: {shapes}")

    @property
    def episodes(self) -> int:
        """E, the number of episodes."""
        return len(self.terminated)

    @property
    def steps(self) -> int:
        """N, the number of steps of all episodes together."""
        return len(self.rewards)

    @cached_property
    def lengths(self) -> npt.NDArray[np.int64]:
        """(E,) steps of each episode."""
        return np.diff(self.offsets)

    @cached_property
    def returns(self) -> npt.NDArray[np.float64]:
        """(E,) undiscounted return of each episode."""
        if not self.episodes:
            return np.zeros(0)
        return np.add.reduceat(self.rewards, self.offsets[:-1], dtype=np.float64)

    @cached_property
    def returns_to_go(self) -> npt.NDArray[np.float32]:
        """(N,) undiscounted sum of rewards from each step to the end of its episode, summed in float64.

        Episode by episode: differences of one running sum over the whole dataset would carry its rounding into each.
        """
        result = np.empty(self.steps, np.float32)
        for start, end in pairwise(self.offsets.tolist()):
            result[start:end] = np.cumsum(self.rewards[start:end][::-1], dtype=np.float64)[::-1]
        result.flags.writeable = False
        return result

    @cached_property
    def state_mean(self) -> npt.NDArray[np.float32]:
        """(S,) mean over all steps."""
        mean: npt.NDArray[np.float32] = self.observations.mean(axis=0, dtype=np.float64).astype(np.float32)
        return mean

    @cached_property
    def state_std(self) -> npt.NDArray[np.float32]:
        """(S,) standard deviation over all steps, plus 1e-6 so that a constant coordinate does not divide by zero."""
        std: npt.NDArray[np.float32] = (self.observations.std(axis=0, dtype=np.float64) + STD_FLOOR).astype(np.float32)
        return std

    @cached_property
    def content_hash(self) -> str:
        """SHA-256 over name, dtype, shape and bytes of all that training can see (not the final observations)."""
        digest = hashlib.sha256()
        for name in _HASHED:
            array: npt.NDArray[np.generic] = getattr(self, name)
            digest.update(f"{name} {array.dtype.str} {array.shape}\n".encode())
            digest.update(array.data)
        return digest.hexdigest()

    def validate(self, task: Task) -> "Trajectories":
        """Itself, if it can train a policy of this task.

        Raises UserError when it is empty, when its dimensions are not the task's, or when a number in it is not finite.
        """
        if not self.episodes:
            raise UserError(f"the dataset for {task.name} holds no complete episode: record or import one that does")
        dimensions = {"observations": task.state_dim, "actions": task.action_dim}
        for name, wanted in dimensions.items():
            if (found := getattr(self, name).shape[1]) != wanted:
                raise UserError(
                    f"the dataset's {name} have {found} dimensions but those of {task.name} ({task.environment}) have "
                    f"{wanted}: give a dataset recorded in that environment"
                )
        for name in ("observations", "actions", "rewards"):
            finite = np.isfinite(getattr(self, name))
            if not finite.all():
                step = int(np.argwhere(~finite)[0, 0])
                episode = int(np.searchsorted(self.offsets, step, side="right")) - 1
                place = f"episode {episode}, step {step - int(self.offsets[episode])}"
                raise UserError(
                    f"the dataset's {name} hold {int((~finite).sum())} values that are not finite (first in {place}): "
                    "remove those episodes or record it again"
                )
        return self


_HASHED = {
    "observations": np.float32,
    "actions": np.float32,
    "rewards": np.float32,
    "offsets": np.int64,
    "terminated": np.bool_,
}
_DTYPES = _HASHED | {"final_observations": np.float32}


def concatenate(parts: Sequence[Trajectories]) -> Trajectories:
    """All episodes of the parts, in order. Final observations survive when every part has them."""
    finals = [part.final_observations for part in parts if part.final_observations is not None]
    starts = np.cumsum([0, *(part.steps for part in parts)])
    return Trajectories(
        observations=np.concatenate([part.observations for part in parts]),
        actions=np.concatenate([part.actions for part in parts]),
        rewards=np.concatenate([part.rewards for part in parts]),
        offsets=np.concatenate([[0], *(part.offsets[1:] + start for part, start in zip(parts, starts, strict=False))]),
        terminated=np.concatenate([part.terminated for part in parts]),
        final_observations=np.concatenate(finals) if len(finals) == len(parts) else None,
    )
