"""Normalised scores, and intervals that say how far a mean can be trusted."""

from collections.abc import Sequence
from typing import overload

import numpy as np
import numpy.typing as npt

from dt.tasks import Task

Float64 = npt.NDArray[np.float64]

RESAMPLES = 2000  # bootstrap samples: the limits of a 95 % interval then vary by about a fiftieth of its width


@overload
def normalised_score(task: Task, returns: float) -> float: ...
@overload
def normalised_score(task: Task, returns: Float64) -> Float64: ...
def normalised_score(task: Task, returns: float | Float64) -> float | Float64:
    """100·(R − random)/(expert − random) with D4RL's reference returns (Fu et al. 2020), elementwise."""
    scores: float | Float64 = 100.0 * (returns - task.random_return) / (task.expert_return - task.random_return)
    return scores


def bootstrap_interval(strata: Sequence[npt.ArrayLike], level: float = 0.95, seed: int = 0) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean of the strata's means.

    A stratum holds what may be exchanged, e.g. the episodes of one task and training seed; each is resampled within
    itself (Agarwal et al. 2021). Raises ValueError without strata or with an empty one.
    """
    return _interval([_samples(stratum) for stratum in strata], 1, level, seed)


def retention_interval(
    numerators: Sequence[npt.ArrayLike], denominators: Sequence[npt.ArrayLike], level: float = 0.95, seed: int = 0
) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean over pairs of strata of mean(numerator)/mean(denominator).

    The limits are not finite where a denominator's mean is zero. Raises ValueError when the two are not pairs, without
    strata or with an empty one.
    """
    pairs = [*zip(numerators, denominators, strict=True)]
    return _interval([_samples(stratum) for pair in pairs for stratum in pair], 2, level, seed)


def _samples(stratum: npt.ArrayLike) -> Float64:
    """A stratum as SciPy takes it: one of a single observation, which it refuses, is that observation twice."""
    samples = np.asarray(stratum, np.float64).reshape(-1)
    if not len(samples):
        raise ValueError("a stratum without a single observation has no mean")
    return np.repeat(samples, 2) if len(samples) == 1 else samples


def _interval(strata: Sequence[Float64], group: int, level: float, seed: int) -> tuple[float, float]:
    """The interval of the mean over groups of 1 (a mean) or 2 (a ratio of means) consecutive strata."""
    from scipy.stats import bootstrap  # a second to import, which a score does not need

    if not strata:
        raise ValueError("an interval needs at least one stratum")

    def statistic(*resampled: Float64, axis: int) -> Float64:
        means = np.stack([samples.mean(axis=axis) for samples in resampled])
        result: Float64 = (means if group == 1 else means[0::2] / means[1::2]).mean(axis=0)
        return result

    with np.errstate(divide="ignore", invalid="ignore"):  # a mean of zero below the line: limits that are not finite
        found = bootstrap(
            strata,
            statistic,
            n_resamples=RESAMPLES,
            batch=RESAMPLES // 4,  # bounds the memory to 500 × the episodes of a stratum
            vectorized=True,
            confidence_level=level,
            method="percentile",
            rng=np.random.default_rng(seed),
        ).confidence_interval
    return float(found.low), float(found.high)
