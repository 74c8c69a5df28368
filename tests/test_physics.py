"""Physics against Gymnasium itself, bit for bit."""

import os
import subprocess
import sys
import warnings
from pathlib import Path

import gymnasium
import mujoco
import numpy as np
import pytest

from dt.errors import UserError
from dt.rollout.physics import _simulator, make_environment, make_physics
from dt.tasks import Task, get_task

INVERTED_PENDULUM = Task(
    name="inverted-pendulum",
    environment="InvertedPendulum-v5",
    state_dim=4,
    action_dim=1,
    target_return=1000.0,
    random_return=0.0,
    expert_return=1000.0,
)
TASKS = [get_task(name) for name in ("hopper", "halfcheetah", "walker2d", "ant")] + [INVERTED_PENDULUM]
SEEDS = [11, 5, 0, 123456, 2**32 - 1]


@pytest.mark.parametrize("environment", ["Hopper-v5", "Walker2d-v5"])
def test_health_is_gymnasium_s_at_every_limit(environment: str) -> None:
    """Each coordinate and velocity just within, at, and just beyond each limit, all others as at the start."""
    env, rules = _simulator(environment)
    limits = [0.0, *env._healthy_z_range, *env._healthy_angle_range, *getattr(env, "_healthy_state_range", ())]
    near = [limit + step for limit in limits if np.isfinite(limit) for step in (-1e-9, 0.0, 1e-9)]
    start = np.concatenate([env.init_qpos, env.init_qvel])
    tried = np.array([[*start[:i], value, *start[i + 1 :]] for i in range(len(start)) for value in near])
    qpos, qvel = np.split(tried, [env.model.nq], axis=1)
    expected = []
    for position, velocity in zip(qpos, qvel, strict=True):
        env.set_state(position, velocity)
        expected.append(env.is_healthy)
    assert 0 < sum(expected) < len(expected)
    assert rules.healthy(env, qpos, qvel).tolist() == expected


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
def test_reset_and_steps_of_random_subsets_equal_gymnasium_bit_for_bit(task: Task, dtype: type) -> None:
    physics, environments = make_physics(task, 5), [make_environment(task.environment) for _ in SEEDS]
    rng = np.random.default_rng(0)
    for _ in range(2):  # the second time over: a reset must leave nothing of the episode before
        observations = physics.reset(SEEDS)
        expected = [env.reset(seed=seed)[0] for env, seed in zip(environments, SEEDS, strict=True)]
        assert np.array_equal(observations, expected)
        assert observations.dtype == np.float64
        running = np.arange(len(SEEDS))
        for _ in range(150):
            ids = running[rng.random(len(running)) < 0.7]
            if not len(ids):
                continue
            actions = rng.uniform(-1.2, 1.2, (len(ids), task.action_dim)).astype(dtype)  # out of range as well
            step = physics.step(ids, actions)
            rows = [environments[i].step(action) for i, action in zip(ids, actions, strict=True)]
            assert np.array_equal(step.observations, [row[0] for row in rows])
            assert np.array_equal(step.rewards, np.array([row[1] for row in rows], np.float64))
            assert np.array_equal(step.terminated, [row[2] for row in rows])
            assert step.rewards.dtype == np.float64
            running = np.setdiff1d(running, ids[step.terminated])
        if task.name != "halfcheetah":  # the only one that never ends early
            assert len(running) < len(SEEDS)


def test_equals_plain_gymnasium_with_all_its_wrappers() -> None:
    """Also along a good gait: random actions let Hopper fall within a second."""
    from dt.behaviour.policy import load_behaviour_policy

    task, policy = get_task("hopper"), load_behaviour_policy("hopper", "expert")
    physics, env = make_physics(task, 1), gymnasium.make(task.environment)
    current = physics.reset([3])
    assert np.array_equal(current[0], env.reset(seed=3)[0])
    for _ in range(300):
        action = policy.act(current.astype(np.float32))
        step = physics.step(np.array([0]), action)
        observation, reward, terminated, _, _ = env.step(action[0])
        assert np.array_equal(step.observations[0], observation)
        assert step.rewards[0] == reward
        assert not terminated
        current = step.observations


def test_stepping_nothing_changes_nothing() -> None:
    for task in (get_task("hopper"), INVERTED_PENDULUM):
        physics = make_physics(task, 2)
        physics.reset([0, 1])
        step = physics.step(np.array([], np.int64), np.zeros((0, task.action_dim), np.float32))
        assert step.observations.shape == (0, task.state_dim)
        assert step.rewards.shape == step.terminated.shape == (0,)


def test_as_many_seeds_as_simulations() -> None:
    for task in (get_task("hopper"), INVERTED_PENDULUM):
        with pytest.raises(ValueError):  # noqa: PT011
            make_physics(task, 2).reset([0])


def test_an_unknown_environment_is_said_in_one_sentence() -> None:
    with pytest.raises(UserError, match="cannot make the environment 'Hoppper-v5'"):
        make_physics(INVERTED_PENDULUM.model_copy(update={"environment": "Hoppper-v5"}), 1)


def test_the_settotalmass_notice_is_silent_and_the_warning_hook_is_put_back(tmp_path: Path) -> None:
    """In a fresh process, since a model is compiled once: nothing printed, no MUJOCO_LOG.TXT, later warnings heard."""
    script = (
        "import mujoco\n"
        "from dt.rollout.physics import make_physics\n"
        "from dt.tasks import get_task\n"
        "mujoco.set_mju_user_warning(print)\n"
        "make_physics(get_task('halfcheetah'), 2)\n"
        "mujoco.MjModel.from_xml_string('<mujoco><compiler settotalmass=\"1\"/></mujoco>')\n"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent)}
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert done.stdout.count("settotalmass") == 1  # ours was silent, the one after it reached the hook
    assert not (tmp_path / "MUJOCO_LOG.TXT").exists()


def test_other_warnings_of_mujoco_are_passed_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    former = mujoco.get_mju_user_warning()

    class Noisy(gymnasium.Env):  # type: ignore[type-arg]
        observation_space = action_space = gymnasium.spaces.Box(-1, 1, (1,))

        def __init__(self) -> None:
            mujoco.get_mju_user_warning()("the mass is negative")

    gymnasium.register("Noisy-v0", Noisy)
    try:
        with warnings.catch_warnings(record=True) as heard:
            warnings.simplefilter("always")
            make_environment("Noisy-v0")
    finally:
        del gymnasium.registry["Noisy-v0"]
    assert [str(warning.message) for warning in heard] == ["the mass is negative"]
    assert mujoco.get_mju_user_warning() is former
