"""Closed-loop evaluation of many policies in many environments at once (facts §9)."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from dt.errors import UserError
from dt.model.policy import Policy
from dt.rollout.actor import Actor, Stack, fast_float32
from dt.rollout.physics import make_physics
from dt.tasks import Task
from dt.training.optimisation import Precision

SHRINK_AT = 0.8  # repack when this share of the slots, or less, still holds a running episode


class Episodes(NamedTuple):
    """The episodes of one policy, in the order of their environment seeds."""

    seeds: NDArray[np.int64]  # (n,)
    returns: NDArray[np.float64]  # (n,) undiscounted, raw
    lengths: NDArray[np.int64]  # (n,) steps
    terminated: NDArray[np.bool_]  # (n,) ended by the environment, not by the horizon


def evaluate(
    policies: Sequence[Policy],
    task: Task,
    *,
    episodes: int,
    seed: int,
    target_returns: float | Literal["best"] = "best",
    precision: Precision = "float32",
) -> list[Episodes]:
    """Roll out every policy from the same starts: episode i uses environment seed `seed + i`.

    target_returns: the raw return asked for, or "best", the best episode's return in the data each policy's head saw.
    Actions are deterministic; the return-to-go falls by each reward received. Returns one `Episodes` a policy.
    Raises UserError for no policies, no episodes, or a policy without a head for the task.
    """
    if not policies or episodes < 1:
        raise UserError(
            f"nothing to evaluate: {len(policies)} policies × {episodes} episodes (both must be at least 1)"
        )
    policies = [policy.alone(task.name) for policy in policies]
    stack = Stack.of(policies, task, precision)
    seeds = np.arange(seed, seed + episodes, dtype=np.int64)
    physics = make_physics(task, len(policies) * episodes)
    actor = Actor(stack, episodes, task.action_dim)
    targets = [_target(policy, task, target_returns) for policy in policies]

    observations = physics.reset(np.tile(seeds, len(policies)).tolist())  # (P·E, S), environments in policy-major order
    returns = np.zeros(len(observations))
    lengths = np.zeros(len(observations), dtype=np.int64)
    terminated = np.zeros(len(observations), dtype=bool)
    goals = np.repeat(np.array(targets, dtype=np.float64), episodes)
    slots = Slots.of(len(policies), episodes)
    running = np.ones(len(observations), dtype=bool)

    with fast_float32() if precision == "float32" else nullcontext():
        for _ in range(task.horizon):
            if running[slots.environments].mean() <= SHRINK_AT:
                slots, kept_policies, kept_episodes = slots.without(~running)
                actor.keep(torch.from_numpy(kept_policies), torch.from_numpy(kept_episodes))
            wanted = (goals - returns)[slots.environments] / task.return_scale
            actions = actor.act(
                torch.from_numpy(observations[slots.environments].astype(np.float32)),
                torch.from_numpy(wanted.astype(np.float32)),
            ).numpy()
            alive = running[slots.environments] & slots.first
            ids = slots.environments[alive]
            observations[ids], rewards, ended = physics.step(ids, actions[alive])
            returns[ids] += rewards
            lengths[ids] += 1
            terminated[ids] = ended
            running[ids] = ~ended
            if not running.any():
                break
    return [
        Episodes(seeds, *(array.reshape(len(policies), episodes)[p] for array in (returns, lengths, terminated)))
        for p in range(len(policies))
    ]


@dataclass(frozen=True)
class Slots:
    """Which environment each slot of the actor's (policies, episodes) grid serves; spare slots repeat another one."""

    environments: NDArray[np.int64]  # (P, E)
    first: NDArray[np.bool_]  # (P, E) False at spare slots

    @classmethod
    def of(cls, policies: int, episodes: int) -> Slots:
        """Every environment has its slot."""
        grid = np.arange(policies * episodes, dtype=np.int64).reshape(policies, episodes)
        return cls(grid, np.ones_like(grid, dtype=bool))

    def without(self, finished: NDArray[np.bool_]) -> tuple[Slots, NDArray[np.int64], NDArray[np.int64]]:
        """Drop finished environments: the smaller grid, the rows kept (P',) and for each the columns kept (P', E')."""
        alive = self.first & ~finished[self.environments]
        rows = np.flatnonzero(alive.any(axis=1))
        width = int(alive.sum(axis=1).max())
        columns = np.argsort(~alive[rows], axis=1, kind="stable")[:, :width]  # running ones first, in order
        first = np.take_along_axis(alive[rows], columns, axis=1)
        return Slots(np.take_along_axis(self.environments[rows], columns, axis=1), first), rows, columns


def _target(policy: Policy, task: Task, target_returns: float | Literal["best"]) -> float:
    return float(policy.heads[task.name]["best_return"]) if target_returns == "best" else target_returns
