"""Scores and intervals against NumPy and against what is known about the bootstrap."""

import numpy as np
import pytest

from dt.scores import bootstrap_interval, normalised_score, retention_interval
from dt.tasks import TASKS, get_task

pytestmark = pytest.mark.filterwarnings("error")


def test_random_scores_0_and_expert_100() -> None:
    for task in TASKS.values():
        assert normalised_score(task, task.random_return) == 0
        assert normalised_score(task, task.expert_return) == pytest.approx(100)


def test_published_scores_of_d4rl() -> None:
    """Mean returns of D4RL's v2 datasets and the scores published with them (reference, data-and-environments §3)."""
    published = {"halfcheetah": (4770.3, 40.7), "hopper": (1422.1, 44.3), "walker2d": (2852.1, 62.1)}
    for name, (mean_return, score) in published.items():
        assert normalised_score(get_task(name), mean_return) == pytest.approx(score, abs=0.05)


def test_scores_are_elementwise() -> None:
    task, returns = get_task("hopper"), np.array([0.0, 1000.0])
    assert normalised_score(task, returns).tolist() == [normalised_score(task, value) for value in (0.0, 1000.0)]
    assert isinstance(normalised_score(task, 1000.0), float)


def test_the_interval_is_the_percentile_of_resampled_means() -> None:
    """A bootstrap of our own with another generator: the limits agree to the accuracy that 2000 resamples allow."""
    rng = np.random.default_rng(0)
    strata = [rng.normal(10, 3, 25), rng.normal(50, 10, 40)]
    means = np.mean([rng.choice(stratum, (4000, len(stratum))).mean(axis=1) for stratum in strata], axis=0)
    low, high = bootstrap_interval(strata)
    width = np.quantile(means, 0.975) - np.quantile(means, 0.025)
    assert [low, high] == pytest.approx(np.quantile(means, [0.025, 0.975]), abs=0.1 * width)
    assert low < np.mean([stratum.mean() for stratum in strata]) < high


def test_strata_are_resampled_within_themselves() -> None:
    """Two constant strata far apart: mixing them would give a wide interval."""
    assert bootstrap_interval([[0.0] * 10, [100.0] * 5]) == (50.0, 50.0)


def test_the_interval_covers_the_true_mean_as_often_as_it_says() -> None:
    rng = np.random.default_rng(1)
    covered = 0
    for trial in range(60):
        low, high = bootstrap_interval([rng.normal(0, 1, 60), rng.normal(1, 2, 60)], level=0.9, seed=trial)
        covered += low <= 0.5 <= high
    assert 0.8 <= covered / 60 <= 0.98


def test_levels_nest_and_seeds_repeat() -> None:
    samples = [np.random.default_rng(2).exponential(size=30)]
    narrow, wide = bootstrap_interval(samples, level=0.5), bootstrap_interval(samples, level=0.99)
    assert wide[0] < narrow[0] < narrow[1] < wide[1]
    assert bootstrap_interval(samples, seed=3) == bootstrap_interval(samples, seed=3)
    assert bootstrap_interval(samples, seed=3) != bootstrap_interval(samples, seed=4)


@pytest.mark.parametrize("strata", [[[5.0]], [[5.0], [7.0]], [[5.0, 5.0, 5.0], [7.0]]])
def test_a_single_observation_or_a_constant_has_an_interval_without_width(strata: list[list[float]]) -> None:
    mean = np.mean([np.mean(stratum) for stratum in strata])
    assert bootstrap_interval(strata) == (mean, mean)


def test_a_single_observation_beside_others_only_shifts() -> None:
    samples = np.random.default_rng(5).normal(size=40)
    low, high = bootstrap_interval([samples, [100.0]])
    assert 49 < low < high < 51


def test_no_observation_has_no_interval() -> None:
    for strata in ([], [[]], [[1.0, 2.0], []]):
        with pytest.raises(ValueError, match=r"stratum"):
            bootstrap_interval(strata)
    with pytest.raises(ValueError, match=r"zip"):
        retention_interval([[1.0]], [])


def test_retention_is_the_mean_over_pairs_of_the_ratio_of_means() -> None:
    assert retention_interval([[50.0, 50.0], [30.0]], [[100.0], [40.0, 40.0]]) == pytest.approx((0.625, 0.625))
    rng = np.random.default_rng(0)
    pairs = [(rng.normal(80, 10, 50), rng.normal(100, 10, 50)), (rng.normal(30, 5, 50), rng.normal(60, 5, 50))]
    ratios = np.mean(
        [rng.choice(a, (4000, 50)).mean(axis=1) / rng.choice(b, (4000, 50)).mean(axis=1) for a, b in pairs],
        axis=0,
    )
    found = retention_interval([a for a, _ in pairs], [b for _, b in pairs])
    limits = np.quantile(ratios, [0.025, 0.975])
    assert found == pytest.approx(limits, abs=0.1 * (limits[1] - limits[0]))


def test_retention_of_nothing_is_infinite_rather_than_a_warning() -> None:
    low, high = retention_interval([[1.0, 2.0]], [[0.0, 0.0]])
    assert not np.isfinite([low, high]).any()
