"""Merging policies by weights, and the perturbations of Table I. Pure functions: inputs are never changed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from dt.errors import UserError, unknown
from dt.merging.groups import parameters_of
from dt.model.policy import Policy
from dt.model.trunk import Trunk

Perturbation = Literal["random", "identity", "removed"]


def merge(policies: Sequence[Policy], group: str, alpha: float | None = None) -> Policy:
    """Merge `group` of several policies into the first, the target; its heads and other parameters stay its own.

    Of a pair: (1−α)·target + α·source (§V); without `alpha`, or of more than two, the uniform mean. α = 0 gives the
    target's parameters and α = 1 the source's bit for bit. Only parameters named in `group` are touched.

    Raises UserError for fewer than two policies, different architectures, α outside [0, 1], α with more than two
    policies, or an unknown group.
    """
    if len(policies) < 2:
        raise UserError(f"merging takes at least two policies, {len(policies)} given")
    target = policies[0]
    for policy in policies[1:]:
        if policy.architecture != target.architecture:
            raise UserError(f"cannot merge different architectures: {target.architecture} with {policy.architecture}")
    if alpha is not None and len(policies) != 2:
        raise UserError(f"alpha weighs a pair; {len(policies)} policies take their uniform mean (leave alpha out)")
    if alpha is not None and not 0 <= alpha <= 1:
        raise UserError(f"alpha must lie in [0, 1], {alpha} given")

    def combine(name: str) -> Tensor:
        tensors = [policy.trunk[name] for policy in policies]
        if alpha is None:
            return torch.stack(tensors).mean(dim=0)
        if alpha in (0.0, 1.0):  # bit for bit: the formula below would turn −0 into 0
            return tensors[int(alpha)]
        return (1 - alpha) * tensors[0] + alpha * tensors[1]

    names = parameters_of(group, target.architecture)
    return with_trunk(target, {name: combine(name) for name in names})


def perturb(policy: Policy, group: str, how: str, seed: int = 0) -> Policy:
    """Replace a group's parameters as Table I does (§V-B).

    random: those of a freshly initialised trunk, one draw fixed by `seed` for all policies of an architecture;
    identity: all-ones weights and zero biases (the paper's word; ones, not an identity matrix);
    removed: the sub-layer adds nothing to the residual stream, which zero output projections do exactly.
    """
    try:
        replacement = _REPLACEMENTS[how]
    except KeyError:
        raise unknown("perturbation", how, _REPLACEMENTS) from None
    return with_trunk(policy, replacement(policy, parameters_of(group, policy.architecture), seed))


def with_trunk(policy: Policy, changed: Mapping[str, Tensor]) -> Policy:
    """The policy with some trunk parameters replaced."""
    return Policy(policy.architecture, {**policy.trunk, **changed}, policy.heads)


def _random(policy: Policy, names: Sequence[str], seed: int) -> dict[str, Tensor]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        fresh = Trunk(policy.architecture).state_dict()
    return {name: fresh[name] for name in names}


def _identity(policy: Policy, names: Sequence[str], _seed: int) -> dict[str, Tensor]:
    return {
        name: (torch.ones_like if name.endswith("weight") else torch.zeros_like)(policy.trunk[name]) for name in names
    }


def _removed(policy: Policy, names: Sequence[str], _seed: int) -> dict[str, Tensor]:
    projections = [name for name in names if ".c_proj." in name]
    if not projections:
        raise UserError(
            "only attention and mlp sub-layers can be removed: name a group that holds their output projection"
        )
    return {name: torch.zeros_like(policy.trunk[name]) for name in projections}


_REPLACEMENTS: Mapping[str, Callable[[Policy, Sequence[str], int], dict[str, Tensor]]] = {
    "random": _random,
    "identity": _identity,
    "removed": _removed,
}
