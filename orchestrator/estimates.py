"""Means with intervals that survive arithmetic.

A `Sample` is a number with its bootstrap distribution. Episodes are resampled within each stratum (one evaluation of
one trained policy); differences, ratios and means over strata are then taken draw by draw, so that a baseline's
uncertainty enters every ratio it divides. What is made of one trained policy meets the same starts as the
policy itself: these are resampled together.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

DRAWS = 2_000
LEVEL = 0.95

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Sample:
    """An estimate and `DRAWS` bootstrap replicates of it."""

    value: float
    draws: Array

    @property
    def interval(self) -> tuple[float, float]:
        """The percentile interval at `LEVEL`."""
        low, high = np.quantile(self.draws, ((1 - LEVEL) / 2, (1 + LEVEL) / 2))
        return float(low), float(high)

    @property
    def finite(self) -> bool:
        """False for a ratio whose denominator was not positive, there or in a replicate."""
        return bool(np.isfinite(self.value) and np.isfinite(self.draws).all())

    def __add__(self, other: Sample) -> Sample:
        return Sample(self.value + other.value, self.draws + other.draws)

    def __mul__(self, factor: float) -> Sample:
        return Sample(self.value * factor, self.draws * factor)

    def __truediv__(self, other: Sample) -> Sample:
        """The ratio; not a number where the denominator is not positive, for then a share of it means nothing."""
        return Sample(
            self.value / other.value if other.value > 0 else float("nan"),
            np.divide(self.draws, other.draws, out=np.full_like(self.draws, np.nan), where=other.draws > 0),
        )


def sample_mean(values: Sequence[float] | Array, together: str) -> Sample:
    """The mean of one stratum's episodes. Strata with equal `together` and size are resampled by the same indices."""
    episodes = np.asarray(values, dtype=np.float64)
    if episodes.size == 0:
        raise ValueError("no episodes")
    return Sample(float(episodes.mean()), episodes[_resamples(together, episodes.size)].mean(axis=1))


@lru_cache(maxsize=256)
def _resamples(together: str, size: int) -> NDArray[np.int64]:
    seed = int.from_bytes(hashlib.sha256(together.encode()).digest()[:8], "little")
    return np.random.default_rng(seed).integers(size, size=(DRAWS, size))


def constant(value: float) -> Sample:
    """A number without uncertainty."""
    return Sample(value, np.full(DRAWS, value))


def standard_error(values: Sequence[float]) -> float:
    """Of the mean of at least two values: their sample deviation / √n."""
    return float(np.std(values, ddof=1) / np.sqrt(len(values)))


def reach(sample: Sample, error: float | None) -> tuple[float, float]:
    """The interval over episodes, or as far as two standard errors over runs reach where that is further."""
    low, high = sample.interval
    spread = 2 * (error or 0.0)
    return min(low, sample.value - spread), max(high, sample.value + spread)


def mean_of(samples: Sequence[Sample]) -> Sample:
    """The mean over strata, each with the same weight."""
    if not samples:
        raise ValueError("no samples")
    return Sample(
        float(np.mean([sample.value for sample in samples])), np.mean([sample.draws for sample in samples], axis=0)
    )
