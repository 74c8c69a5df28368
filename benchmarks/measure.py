"""Timing side by side: rounds in turn, so that a machine's moods meet all alike."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import median

import torch

from dt.bfloat16 import products_in
from dt.rollout.actor import DTYPES
from dt.training.optimisation import Precision


@dataclass(frozen=True)
class Measurement:
    """One row of the table. Seconds are medians over rounds, for one unit of work."""

    name: str
    unit: str
    ours: float
    literal: float | None = None  # the field's way, kept in `literal.py`
    floor: float | None = None  # what the products alone would take at the rate measured in the same run

    @property
    def speedup(self) -> float | None:
        """literal / ours."""
        return self.literal / self.ours if self.literal else None

    @property
    def of_floor(self) -> float | None:
        """floor / ours: the share of the machine's rate that is used."""
        return self.floor / self.ours if self.floor else None


def interleaved(work: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median seconds of each, after one round that does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in work}
    for count in range(rounds + 1):
        for name, call in work.items():
            began = time.perf_counter()
            call()
            if count:
                seconds[name].append(time.perf_counter() - began)
    return {name: median(found) for name, found in seconds.items()}


def product_rate(precision: Precision, rows: int, width: int = 512, inner: int = 512, repeats: int = 20) -> float:
    """FLOP/s of a matrix product (rows, width) · (width, inner) as torch runs it here: the roofline of what we do.

    (By way of float32 where the processor cannot multiply in bfloat16, for PyTorch's own loops are ten times as slow.)
    """
    a, b = (torch.randn(shape, dtype=DTYPES[precision]) for shape in ((rows, width), (width, inner)))
    with products_in(precision, torch.device("cpu")):
        a @ b
        began = time.perf_counter()
        for _ in range(repeats):
            a @ b
    return 2 * rows * width * inner * repeats / (time.perf_counter() - began)
