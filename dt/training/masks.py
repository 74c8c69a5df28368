"""Binary masks over the trunk's matrices, one per task: how they are drawn, swapped, merged and described (HarmoDT).

All masks together are one boolean tensor (N, E): N tasks, E entries of the masked matrices end to end in depth order.
Scores and gradients of those entries have the same layout.
"""

from __future__ import annotations

import math
from itertools import combinations

import numpy as np
import torch
from torch import Tensor

from dt.errors import UserError
from dt.model.architecture import Architecture
from dt.model.flat import Shapes, entries, flattened
from dt.model.policy import Policy
from dt.model.shapes import trunk_shapes


def masked_shapes(architecture: Architecture) -> dict[str, tuple[int, ...]]:
    """Name → shape of the trunk parameters that are masked, in depth order: its matrices.

    Differs from the release, which also draws, scores and swaps masks of heads, biases and layer norms: the former
    never have an effect, the latter delete whole features of a task.
    """
    return {name: shape for name, shape in trunk_shapes(architecture).items() if len(shape) == 2}


def erk_densities(shapes: Shapes, sparsity: float) -> dict[str, float]:
    """Name → share of a tensor's entries to keep (Erdős–Rényi kernel, Evci et al. 2020, power 1).

    Densities are in proportion to (sum of the dimensions) / (their product), such that the share `sparsity` of all
    entries is left out; a tensor that would need more than all of its entries is kept whole and the others pay for it.
    Raises UserError for a sparsity outside [0, 1).
    """
    if not 0 <= sparsity < 1:
        raise UserError(f"no masks of sparsity {sparsity:g}: choose at least 0 (nothing masked) and less than 1")
    raw = {name: sum(shape) / math.prod(shape) for name, shape in shapes.items()}
    budget, shared = (1 - sparsity) * entries(shapes), dict(shapes)
    while shared:
        scale = budget / sum(map(sum, shared.values()))
        largest = max(raw[name] for name in shared)
        if scale * largest < 1 - 1e-9:  # so that rounding leaves nothing out at sparsity 0
            break
        full = {name: shape for name, shape in shared.items() if raw[name] == largest}
        budget -= entries(full)
        shared = {name: shape for name, shape in shared.items() if name not in full}
    return {name: scale * raw[name] if name in shared else 1.0 for name in shapes}


def drawn(shapes: Shapes, sparsity: float, tasks: int, seed: int) -> Tensor:
    """Random masks (N, E) bool: each task keeps each entry with its tensor's ERK density, all independently."""
    densities = erk_densities(shapes, sparsity)
    kept = np.concatenate([np.full(math.prod(shape), densities[name]) for name, shape in shapes.items()])
    generators = [np.random.Generator(np.random.PCG64(child)) for child in np.random.SeedSequence(seed).spawn(tasks)]
    return torch.from_numpy(np.stack([generator.random(len(kept)) < kept for generator in generators]))


def agreement(gradients: Tensor) -> Tensor:
    """(N, E) → (N, E): each task's gradient times the mean gradient. Positive where the task pulls with the average.

    Differs from the release, which sums into the first task's gradient and so spares that task's conflicts.
    """
    return gradients.mean(dim=0) * gradients


def swappable(kept: Tensor) -> int:
    """The largest number of entries that every task can give up and take up."""
    ones = kept.sum(dim=1)
    return int(torch.minimum(ones, kept.shape[1] - ones).min())


def swapped(kept: Tensor, worth: Tensor, promise: Tensor, count: int) -> Tensor:
    """Each task gives up the `count` kept entries of least worth and takes up as many masked ones of most promise.

    All (N, E). Selection is over the whole trunk, so that densities of single matrices may drift. At most
    `swappable(kept)` entries can be swapped. Differs from the release, which separates candidates by an additive offset
    in which the scores drown.
    """
    given_up = worth.masked_fill(~kept, math.inf).topk(count, dim=1, largest=False).indices
    taken_up = promise.masked_fill(kept, -math.inf).topk(count, dim=1).indices
    return kept.scatter(1, given_up, False).scatter(1, taken_up, True)


def vote(policy: Policy, threshold: int) -> Policy:
    """One trunk for all tasks: a weight stays if at least `threshold` tasks keep it, else it is 0; heads stay apart.

    1 is the union of the masks, the number of tasks their intersection. Raises UserError when the policy has no masks
    or fewer tasks than that.
    """
    unmasked = [task for task in policy.heads if task not in policy.masks]
    if unmasked or policy.specific:
        raise UserError("masks are voted on in a policy that HarmoDT trained: every task needs one, on one trunk")
    if not 1 <= threshold <= len(policy.masks):
        raise UserError(f"{threshold} votes of {len(policy.masks)} tasks: choose 1 to {len(policy.masks)}")
    trunk = dict(policy.trunk)
    for name in next(iter(policy.masks.values())):
        votes = torch.stack([masks[name] for masks in policy.masks.values()]).sum(dim=0)
        trunk[name] = trunk[name] * (votes >= threshold)
    return Policy(policy.architecture, trunk, policy.heads)


def mask_statistics(policy: Policy) -> dict[str, float]:
    """`density/<task>/<matrix>`: the share kept; `iou/<task>/<task>`: entries both keep over entries either keeps."""
    shapes = masked_shapes(policy.architecture)
    densities = {
        f"density/{task}/{name.removesuffix('.weight')}": float(mask.float().mean())
        for task, masks in policy.masks.items()
        for name, mask in masks.items()
    }
    kept = {task: flattened(masks, shapes) for task, masks in policy.masks.items()}
    overlaps = {
        f"iou/{a}/{b}": float((kept[a] & kept[b]).sum() / (kept[a] | kept[b]).sum()) for a, b in combinations(kept, 2)
    }
    return densities | overlaps
