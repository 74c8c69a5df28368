"""How large a policy is, counted as the paper counts and counted in full."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from dt.frozen import Frozen
from dt.model.shapes import block_parameters

if TYPE_CHECKING:
    from torch import Tensor

    from dt.model.policy import Policy

BITS = 32  # of a stored parameter


class Size(Frozen):
    """Numbers of parameters that have to be stored. A mask counts a bit an entry, so a 32nd of a parameter."""

    shared: int  # trunk parameters all tasks share
    specific: int  # trunk parameters of single tasks
    heads: int  # embeddings, their layer norm, the time-step table and the action predictor of every task
    mask_bits: int
    transformer: float  # the paper's measure: blocks stored / blocks of one trunk; 1.0026 for three layer norms apart

    @property
    def total(self) -> float:
        """All of it, in parameters."""
        return self.shared + self.specific + self.heads + self.mask_bits / BITS


def size_of(policy: Policy) -> Size:
    """Of one policy for all its tasks.

    The paper's measure ("transformer size", Table II) leaves out the final layer norm and the heads, of which the
    time-step table alone is 21.5 % as large as the paper's transformer; `total` leaves out nothing.
    """
    from dt.model.policy import STATISTICS  # heavy: who reads sizes from a table needs no torch

    apart, masks = policy.specific.values(), policy.masks.values()
    blocks = _count(policy.trunk, "h.") + sum(_count(part, "h.") for part in apart)
    blocks_with_masks = blocks + sum(_count(part, "h.") for part in masks) / BITS
    return Size(
        shared=_count(policy.trunk),
        specific=sum(map(_count, apart)),
        heads=sum(t.numel() for head in policy.heads.values() for name, t in head.items() if name not in STATISTICS),
        mask_bits=sum(map(_count, masks)),
        transformer=blocks_with_masks / block_parameters(policy.architecture),
    )


def _count(tensors: Mapping[str, Tensor], prefix: str = "") -> int:
    return sum(tensor.numel() for name, tensor in tensors.items() if name.startswith(prefix))
