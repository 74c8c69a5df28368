"""Closed-loop evaluation of a policy in many environments at once."""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from dt.bfloat16 import products_in
from dt.errors import UserError
from dt.model.policy import Policy
from dt.rollout.actor import Actor, Weights, fast_float32
from dt.rollout.physics import make_physics
from dt.tasks import Task
from dt.training.optimisation import Precision

SHRINK_AT = 0.8  # forget the episodes that ended when this share of those that are tracked, or less, is still running


class Episodes(NamedTuple):
    """The episodes of a policy, in the order of their environment seeds."""

    seeds: NDArray[np.int64]  # (n,)
    returns: NDArray[np.float64]  # (n,) undiscounted, raw
    lengths: NDArray[np.int64]  # (n,) steps
    terminated: NDArray[np.bool_]  # (n,) ended by the environment, not by the horizon


def evaluate(
    policy: Policy,
    task: Task,
    *,
    episodes: int,
    seed: int,
    target_return: float | Literal["best"] = "best",
    precision: Precision = "float32",
) -> Episodes:
    """Roll a policy out: episode i starts from environment seed `seed + i`, so all policies meet the same starts.

    target_return: the raw return asked for, or "best", the best episode's return in the data the policy's head saw.
    Actions are deterministic; the return-to-go falls by each reward received.
    Raises UserError for no episodes, or a policy without a head for the task.
    """
    if episodes < 1:
        raise UserError(f"nothing to evaluate: {episodes} episodes (it must be at least 1)")
    actor = Actor(Weights.of(policy, task, precision), episodes)
    goal = wanted_return(policy, task, target_return)
    physics = make_physics(task, episodes)
    seeds = np.arange(seed, seed + episodes, dtype=np.int64)
    observations = physics.reset(seeds.tolist())  # (n, S)
    returns, lengths = np.zeros(episodes), np.zeros(episodes, dtype=np.int64)
    terminated = np.zeros(episodes, dtype=bool)
    tracked = np.arange(episodes)  # by row of the actor: the running episodes and, for a while, others that have ended

    with fast_float32() if precision == "float32" else products_in(precision, torch.device("cpu")):
        for _ in range(task.horizon):
            running = ~terminated[tracked]
            if not running.any():
                break
            if running.mean() <= SHRINK_AT:
                actor.keep(torch.from_numpy(np.flatnonzero(running)))
                tracked, running = tracked[running], running[running]
            wanted = (goal - returns[tracked]) / task.return_scale
            actions = actor.act(
                torch.from_numpy(observations[tracked].astype(np.float32)), torch.from_numpy(wanted.astype(np.float32))
            ).numpy()
            ids = tracked[running]
            observations[ids], rewards, terminated[ids] = physics.step(ids, actions[running])
            returns[ids] += rewards
            lengths[ids] += 1
    return Episodes(seeds, returns, lengths, terminated)


def wanted_return(policy: Policy, task: Task, target_return: float | Literal["best"]) -> float:
    """The raw return that is asked for: that one, or the best in the data the policy's head for the task saw.

    Raises UserError for one that is not finite.
    """
    wanted = float(policy.heads[task.name]["best_return"]) if target_return == "best" else target_return
    if not math.isfinite(wanted):
        raise UserError(
            f"a target return of {wanted} cannot be asked for: give a finite one, as in {task.target_return:g}"
        )
    return wanted
