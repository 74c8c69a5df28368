"""Many simulations of one environment, stepped together: observations, rewards and terminations exactly as Gymnasium's.

The three tasks of the paper run on `mujoco.batch`; every other environment runs as a plain list of Gymnasium
environments. Time limits are the caller's business: nothing here truncates, and nothing resets itself.
"""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple, Protocol

import gymnasium
import mujoco
import mujoco.batch
import numpy as np
import numpy.typing as npt
from gymnasium.utils.seeding import np_random

from dt.errors import UserError
from dt.tasks import Task

Float64 = npt.NDArray[np.float64]


class Transition(NamedTuple):
    """What one step gives each of m simulations."""

    observations: Float64  # (m, S), after the step
    rewards: Float64  # (m,)
    terminated: npt.NDArray[np.bool_]  # (m,)


class Physics(Protocol):
    """n simulations of one environment."""

    def reset(self, seeds: Sequence[int]) -> Float64:
        """Start all n again, simulation i from `env.reset(seed=seeds[i])`. Returns observations (n, S)."""
        ...

    def step(self, ids: npt.NDArray[np.int64], actions: npt.NDArray[np.floating[Any]]) -> Transition:
        """Advance simulations `ids` (m,), sorted and unique, by `actions` (m, A); the others stand still."""
        ...


def make_physics(task: Task, count: int) -> Physics:
    """`count` simulations of the task's environment. Raises UserError when Gymnasium cannot make it."""
    if task.environment in _BATCHED:
        return _BatchPhysics(_simulator(task.environment), count)
    return _GymnasiumPhysics(task.environment, count)


def make_environment(environment: str, **options: Any) -> gymnasium.Env[Any, Any]:
    """`gymnasium.make` without its time limit and checker, and without MuJoCo's notice about `settotalmass`.

    HalfCheetah's model file uses that attribute, deprecated since MuJoCo 3.16: every compilation would print two lines
    and append them to MUJOCO_LOG.TXT. The warning hook is global, so it is replaced only here, and other warnings are
    passed on. Raises UserError when the environment is unknown or needs a package that is missing.
    """
    heard: list[str] = []
    former = mujoco.get_mju_user_warning()
    mujoco.set_mju_user_warning(heard.append)
    try:
        made: gymnasium.Env[Any, Any] = gymnasium.make(
            environment, max_episode_steps=-1, disable_env_checker=True, **options
        )
    except gymnasium.error.Error as error:
        raise UserError(f"Gymnasium cannot make the environment {environment!r}: {error}") from error
    finally:
        mujoco.set_mju_user_warning(former)
    for message in heard:
        if "settotalmass" not in message:
            warnings.warn(message, RuntimeWarning, stacklevel=2)
    return made


# --- mujoco.batch -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Rules:
    """What Gymnasium's Python around the physics does, for one environment."""

    velocity_clip: float  # of the velocities in the observation
    gaussian_velocities: bool  # reset noise of the velocities: Gaussian, else uniform
    healthy: Callable[[Any, Float64, Float64], npt.NDArray[np.bool_]] | None  # (env, qpos (m, ·), qvel (m, ·)) → (m,)


def _within(values: Float64, limits: tuple[float, float]) -> npt.NDArray[np.bool_]:
    """Strictly, as Gymnasium compares."""
    return (limits[0] < values) & (values < limits[1])


def _upright(env: Any, qpos: Float64, _qvel: Float64) -> npt.NDArray[np.bool_]:
    """walker2d_v5.py, `is_healthy`."""
    return _within(qpos[:, 1], env._healthy_z_range) & _within(qpos[:, 2], env._healthy_angle_range)


def _upright_and_bounded(env: Any, qpos: Float64, qvel: Float64) -> npt.NDArray[np.bool_]:
    """hopper_v5.py, `is_healthy`: the state without its first two coordinates must stay in range as well."""
    state = np.concatenate([qpos[:, 2:], qvel], axis=1)
    return _upright(env, qpos, qvel) & _within(state, env._healthy_state_range).all(axis=1)


_BATCHED = {
    "HalfCheetah-v5": _Rules(velocity_clip=np.inf, gaussian_velocities=True, healthy=None),
    "Hopper-v5": _Rules(velocity_clip=10.0, gaussian_velocities=False, healthy=_upright_and_bounded),
    "Walker2d-v5": _Rules(velocity_clip=10.0, gaussian_velocities=False, healthy=_upright),
}


@cache
def _simulator(environment: str) -> tuple[Any, _Rules]:
    """Gymnasium's own instance, for its compiled model and its constants, so that none is written a second time."""
    return make_environment(environment).unwrapped, _BATCHED[environment]


class _BatchPhysics:
    """Gymnasium's step and reset over all simulations at once, single-threaded: workers are processes, not threads."""

    def __init__(self, simulator: tuple[Any, _Rules], count: int) -> None:
        self._env, self._rules = simulator
        self._batch = mujoco.batch.Batch(self._env.model, nsim=count, nthread=1)
        self._qpos, self._qvel, self._ctrl = (self._batch.bind(name) for name in ("qpos", "qvel", "ctrl"))

    def reset(self, seeds: Sequence[int]) -> Float64:
        if len(seeds) != self._batch.nsim:
            raise ValueError(f"{self._batch.nsim} simulations need as many seeds, not {len(seeds)}")
        env, scale = self._env, self._env._reset_noise_scale
        self._batch.reset(stage=mujoco.mjtStage.mjSTAGE_NONE.value)
        for i, seed in enumerate(seeds):  # one generator a seed is what makes a start Gymnasium's
            random, _ = np_random(int(seed))
            self._qpos[i] = env.init_qpos + random.uniform(-scale, scale, env.model.nq)
            noise = (
                scale * random.standard_normal(env.model.nv)
                if self._rules.gaussian_velocities
                else random.uniform(-scale, scale, env.model.nv)
            )
            self._qvel[i] = env.init_qvel + noise
        self._batch.forward()
        return self._observe(self._qpos, self._qvel)

    def step(self, ids: npt.NDArray[np.int64], actions: npt.NDArray[np.floating[Any]]) -> Transition:
        env, rules = self._env, self._rules
        before = self._qpos[ids, 0]
        self._ctrl[ids] = actions
        self._batch.step(ids, nstep=env.frame_skip)
        qpos, qvel = self._qpos[ids], self._qvel[ids]
        rewards = env._forward_reward_weight * ((qpos[:, 0] - before) / env.dt)
        terminated = np.zeros(len(ids), np.bool_)
        if rules.healthy is not None:
            healthy = rules.healthy(env, qpos, qvel)
            rewards = rewards + healthy * env._healthy_reward
            terminated = ~healthy
        # In the actions' own precision and subtracted last, as Gymnasium does: anything else differs in the last bit.
        rewards = rewards - env._ctrl_cost_weight * np.sum(np.square(actions), axis=1)
        return Transition(self._observe(qpos, qvel), rewards, terminated)

    def _observe(self, qpos: Float64, qvel: Float64) -> Float64:
        limit = self._rules.velocity_clip
        return np.concatenate([qpos[:, 1:], np.clip(qvel, -limit, limit)], axis=1)


# --- any other environment --------------------------------------------------------------------------------------------


class _GymnasiumPhysics:
    """A list of Gymnasium environments, stepped one after the other."""

    def __init__(self, environment: str, count: int) -> None:
        self._envs = [make_environment(environment) for _ in range(count)]

    def reset(self, seeds: Sequence[int]) -> Float64:
        starts = [env.reset(seed=int(seed))[0] for env, seed in zip(self._envs, seeds, strict=True)]
        return np.array(starts, np.float64)

    def step(self, ids: npt.NDArray[np.int64], actions: npt.NDArray[np.floating[Any]]) -> Transition:
        results = [self._envs[i].step(action) for i, action in zip(ids, actions, strict=True)]
        observations, rewards, terminated, _, _ = zip(*results, strict=True) if results else ((),) * 5
        shape = (len(results), *(self._envs[0].observation_space.shape or ()))
        return Transition(
            np.array(observations, np.float64).reshape(shape),
            np.array(rewards, np.float64),
            np.array(terminated, np.bool_),
        )
