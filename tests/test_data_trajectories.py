"""Trajectories: suffix sums, statistics, identity and validation."""

import hashlib

import numpy as np
import pytest

from dt.data.trajectories import Trajectories, concatenate
from dt.errors import UserError
from dt.tasks import get_task

HOPPER = get_task("hopper")


def make(lengths: list[int], seed: int = 0, state_dim: int = 11, action_dim: int = 3) -> Trajectories:
    rng = np.random.default_rng(seed)
    steps, episodes = sum(lengths), len(lengths)
    return Trajectories(
        observations=rng.normal(size=(steps, state_dim)).astype(np.float32),
        actions=rng.uniform(-1, 1, (steps, action_dim)).astype(np.float32),
        rewards=rng.normal(2, 1, steps).astype(np.float32),
        offsets=np.cumsum([0, *lengths]),
        terminated=rng.random(episodes) < 0.5,
        final_observations=rng.normal(size=(episodes, state_dim)).astype(np.float32),
    )


def test_returns_and_returns_to_go_are_the_sums_over_each_episode() -> None:
    data = make([1, 5, 300])
    expected = []
    for start, end in ((0, 1), (1, 6), (6, 306)):
        for step in range(start, end):
            total = 0.0
            for later in reversed(range(step, end)):
                total += float(data.rewards[later])
            expected.append(total)
    assert np.array_equal(data.returns_to_go, np.array(expected, np.float32))
    assert data.returns_to_go.dtype == np.float32
    assert data.returns == pytest.approx([expected[0], expected[1], expected[6]], rel=1e-12)
    assert data.lengths.tolist() == [1, 5, 300]
    assert (data.episodes, data.steps) == (3, 306)


def test_returns_to_go_of_an_episode_do_not_depend_on_its_neighbours() -> None:
    large = Trajectories(
        observations=np.zeros((3, 1)),
        actions=np.zeros((3, 1)),
        rewards=np.array([1e9, 1e-3, 2e-3]),
        offsets=np.array([0, 1, 3]),
        terminated=np.zeros(2),
    )
    assert large.returns_to_go[1:] == pytest.approx([3e-3, 2e-3], rel=1e-6)


def test_state_statistics_are_those_of_all_steps_in_double_precision() -> None:
    data = make([40, 60])
    wide = data.observations.astype(np.float64)
    assert data.state_mean == pytest.approx(wide.mean(0), abs=1e-7)
    assert data.state_std == pytest.approx(np.sqrt(((wide - wide.mean(0)) ** 2).mean(0)) + 1e-6, rel=1e-6)


def test_concatenation_keeps_every_episode() -> None:
    first, second = make([3, 4], 1), make([5], 2)
    both = concatenate([first, second])
    assert both.offsets.tolist() == [0, 3, 7, 12]
    assert np.array_equal(both.rewards[7:], second.rewards)
    assert np.array_equal(both.returns, np.concatenate([first.returns, second.returns]))
    assert both.final_observations is not None
    assert np.array_equal(both.final_observations[2:], second.final_observations)


def test_content_hash_is_sha256_of_names_dtypes_shapes_and_bytes() -> None:
    data = make([3, 4])
    digest = hashlib.sha256()
    for name in ("observations", "actions", "rewards", "offsets", "terminated"):
        array = getattr(data, name)
        digest.update(f"{name} {array.dtype.str} {array.shape}\n".encode() + array.tobytes())
    assert data.content_hash == digest.hexdigest()


@pytest.mark.parametrize("field", ["observations", "actions", "rewards", "terminated"])
def test_content_hash_sees_every_array(field: str) -> None:
    data = make([3, 4])
    arrays = {name: np.array(getattr(data, name)) for name in ("observations", "actions", "rewards", "terminated")}
    arrays[field].flat[0] = not arrays[field].flat[0] if field == "terminated" else arrays[field].flat[0] + 1
    assert Trajectories(**arrays, offsets=data.offsets).content_hash != data.content_hash


def test_content_hash_sees_where_episodes_are_cut() -> None:
    data = make([3, 4])
    other = Trajectories(data.observations, data.actions, data.rewards, np.array([0, 4, 7]), data.terminated)
    assert other.content_hash != data.content_hash


def test_arrays_are_read_only_and_the_callers_stay_writable() -> None:
    rewards = np.zeros(2, np.float32)
    data = Trajectories(np.zeros((2, 1)), np.zeros((2, 1)), rewards, np.array([0, 2]), np.zeros(1))
    for name in ("observations", "actions", "rewards", "offsets", "terminated", "returns_to_go"):
        with pytest.raises(ValueError, match="read-only"):
            getattr(data, name)[0] = 1
    rewards[0] = 1


@pytest.mark.parametrize(
    "change",
    [
        {"rewards": np.zeros(6)},
        {"offsets": np.array([0, 3, 6])},
        {"offsets": np.array([0, 3, 3, 7])},
        {"offsets": np.array([1, 3, 7])},
        {"terminated": np.zeros(3)},
        {"observations": np.zeros(7)},
        {"final_observations": np.zeros((2, 4))},
    ],
)
def test_arrays_that_contradict_each_other_are_refused(change: dict[str, np.ndarray]) -> None:
    data = make([3, 4])
    arrays = {name: getattr(data, name) for name in ("observations", "actions", "rewards", "offsets", "terminated")}
    with pytest.raises(ValueError, match="do not fit together"):
        Trajectories(**(arrays | change))


def test_validate_accepts_actions_out_of_range() -> None:
    data = make([3, 4])
    assert data.validate(HOPPER) is data
    stretched = Trajectories(data.observations, data.actions * 3, data.rewards, data.offsets, data.terminated)
    assert stretched.validate(HOPPER) is stretched


def test_validate_names_both_dimensions() -> None:
    with pytest.raises(UserError, match=r"observations have 17 dimensions but those of hopper \(Hopper-v5\) have 11"):
        make([3], state_dim=17).validate(HOPPER)
    with pytest.raises(UserError, match=r"actions have 6 dimensions but those of hopper \(Hopper-v5\) have 3"):
        make([3], action_dim=6).validate(HOPPER)


def test_validate_refuses_an_empty_dataset() -> None:
    empty = Trajectories(np.zeros((0, 11)), np.zeros((0, 3)), np.zeros(0), np.zeros(1), np.zeros(0))
    with pytest.raises(UserError, match="no complete episode"):
        empty.validate(HOPPER)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("field", ["observations", "actions", "rewards"])
def test_validate_says_where_a_number_is_not_finite(field: str, value: float) -> None:
    data = make([3, 4])
    arrays = {name: np.array(getattr(data, name)) for name in ("observations", "actions", "rewards")}
    arrays[field][5] = value
    spoiled = Trajectories(**arrays, offsets=data.offsets, terminated=data.terminated)
    with pytest.raises(UserError, match=rf"{field} hold .* not finite \(first in episode 1, step 2\)"):
        spoiled.validate(HOPPER)
