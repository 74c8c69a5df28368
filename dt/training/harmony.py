"""Every hyper-parameter of HarmoDT's masks (Hu et al. 2024), in one typed record."""

from typing import Literal

from pydantic import Field

from dt.frozen import Frozen

Importance = Literal[
    "fisher", "magnitude", "random"
]  # of a weight to a task: squared gradient, |θ|; random: never swap


class Harmony(Frozen):
    """Hyper-parameters of the masks. The defaults are the released code's sizes with its mistakes mended."""

    sparsity: float = Field(0.2, ge=0, lt=1)  # share of the trunk's matrices that a task masks
    interval: int = Field(500, gt=0)  # updates between two swaps
    swapped: float = Field(0.021, ge=0)  # entries swapped per task in the whole run / entries of the matrices
    schedule: Literal["bump", "decay"] = "bump"  # of the swaps: none, most at half time, none; or most to none
    importance: Importance = "fisher"
    agreement_weight: float = Field(10.0, ge=0)  # λ of agreement against importance
    score_batches: int = Field(10, gt=0)  # whose mean gradient the scores are made of
    scoring: Literal["evaluation", "training"] = "evaluation"  # no dropout, whole gradient; or dropout, clipped
    clip: Literal["masked", "dense"] = "masked"  # whose norm is limited: the gradient of kept weights, or of all


RELEASED = Harmony(interval=500, schedule="bump", score_batches=1, scoring="training", clip="dense")
"""As noisy as the released code: one batch per score, with dropout, clipped; training clipped before the mask.

What is mended either way: the first task's overwritten gradient, masked entries that have no gradient to be chosen by,
offsets in which scores drown, masks of heads, biases and layer norms; the swaps are a share of the trunk, not 0 to 100.
"""
