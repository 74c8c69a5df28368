"""Parameters end to end in one row of numbers, so that what holds entry by entry is one operation over all of them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

Shapes = Mapping[str, Sequence[int]]


def entries(shapes: Shapes) -> int:
    """E, the number of entries of all tensors together."""
    return sum(map(math.prod, shapes.values()))


def flattened(tensors: Mapping[str, Tensor], shapes: Shapes) -> Tensor:
    """Those of the tensors that `shapes` names, end to end: (E,)."""
    return torch.cat([tensors[name].flatten() for name in shapes])


def unflattened(flat: Tensor, shapes: Shapes) -> dict[str, Tensor]:
    """The inverse of `flattened`, of one row or of many: (…, E) → views (…, *shape) by name."""
    parts = torch.split(flat, [math.prod(shape) for shape in shapes.values()], dim=-1)
    return {
        name: part.view(*flat.shape[:-1], *shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)
    }
