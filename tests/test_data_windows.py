"""Windows against a literal loop over samples, written from the description of the original code's sampling."""

import numpy as np
import pytest
import torch
from test_data_trajectories import make

from dt.data.trajectories import Trajectories
from dt.data.windows import Windows
from dt.tasks import Task, get_task

HOPPER = get_task("hopper")


def windows_by_hand(data: Trajectories, task: Task, context: int, steps: np.ndarray) -> dict[str, np.ndarray]:
    """A window for each starting step: `context` steps or to the end of the episode, zeros on the left of fewer."""
    mean, std = data.observations.mean(0), data.observations.std(0) + 1e-6
    columns: dict[str, list[np.ndarray]] = {name: [] for name in ("rtg", "states", "actions", "timesteps", "mask")}
    for step in steps:
        episode = max(e for e in range(data.episodes) if data.offsets[e] <= step)
        start, end = int(data.offsets[episode]), int(data.offsets[episode + 1])
        chosen = list(range(step, min(step + context, end)))
        rtg, states = np.zeros((context, 1)), np.zeros((context, data.observations.shape[1]))
        actions, timesteps = np.zeros((context, data.actions.shape[1])), np.zeros(context, np.int64)
        mask = np.zeros(context, bool)
        for position, row in zip(range(context - len(chosen), context), chosen, strict=True):
            rtg[position] = data.rewards[row:end].astype(np.float64).sum() / task.return_scale
            states[position] = (data.observations[row] - mean) / std
            actions[position] = data.actions[row]
            timesteps[position] = min(row - start, task.horizon - 1)
            mask[position] = True
        for name, value in zip(columns, (rtg, states, actions, timesteps, mask), strict=True):
            columns[name].append(value)
    return {name: np.stack(values) for name, values in columns.items()}


@pytest.mark.parametrize("context", [1, 4, 20])
def test_windows_equal_those_of_a_loop(context: int) -> None:
    data = make([1, 2, 19, 20, 21, 60])
    batch = Windows.of(data, HOPPER, context).sample(200, np.random.default_rng(3))
    expected = windows_by_hand(data, HOPPER, context, np.random.default_rng(3).integers(data.steps, size=200))
    assert np.array_equal(batch.mask.numpy(), expected["mask"])
    assert np.array_equal(batch.timesteps.numpy(), expected["timesteps"])
    assert np.array_equal(batch.actions.numpy(), expected["actions"].astype(np.float32))
    assert batch.returns_to_go.numpy() == pytest.approx(expected["rtg"], rel=1e-6, abs=1e-9)
    assert batch.states.numpy() == pytest.approx(expected["states"], abs=1e-5)


def test_batches_have_the_promised_shapes_and_types() -> None:
    batch = Windows.of(make([30, 40]), HOPPER, 8).sample(5, np.random.default_rng(0))
    assert [tuple(column.shape) for column in batch] == [(5, 8, 1), (5, 8, 11), (5, 8, 3), (5, 8), (5, 8)]
    assert [column.dtype for column in batch] == [torch.float32] * 3 + [torch.int64, torch.bool]


def test_time_steps_are_clipped_to_the_horizon() -> None:
    task = HOPPER.model_copy(update={"horizon": 10})
    batch = Windows.of(make([30]), task, 4).sample(200, np.random.default_rng(0))
    assert int(batch.timesteps.max()) == 9


def test_starts_are_uniform_over_steps_so_trajectories_are_drawn_by_length() -> None:
    """Every step of every episode is the first of a window equally often: a chi-squared test at 1 in 10,000."""
    data = make([1, 9, 30])
    rtg = data.returns_to_go / np.float32(HOPPER.return_scale)
    batch = Windows.of(data, HOPPER, 5).sample(40_000, np.random.default_rng(0))
    first = batch.mask.int().argmax(1)
    found = batch.returns_to_go[torch.arange(40_000), first, 0].numpy()
    counts = np.array([(found == value).sum() for value in rtg])
    assert counts.sum() == 40_000
    assert ((counts - 1000) ** 2 / 1000).sum() < 82.0  # the 0.9999 quantile for 39 degrees of freedom


def test_the_same_generator_gives_the_same_batches() -> None:
    windows = Windows.of(make([30, 40]), HOPPER, 8)
    first, second = (windows.sample(16, np.random.default_rng(7)) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
