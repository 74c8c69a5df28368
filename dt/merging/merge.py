"""Merging policies by weights, and the perturbations of Table I. Pure functions: inputs are never changed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from dt.errors import UserError, unknown
from dt.merging.groups import parameters_of
from dt.model.flat import flattened, unflattened
from dt.model.policy import Policy
from dt.model.trunk import Trunk

Perturbation = Literal["random", "identity", "removed"]
Fisher = Mapping[str, Tensor]  # trunk parameter → importance of each entry, ≥ 0


def merge(
    policies: Sequence[Policy],
    group: str,
    alpha: float | None = None,
    fisher: Sequence[Fisher] | None = None,
) -> Policy:
    """Merge `group` of several policies into the first, the target; its heads and other parameters stay its own.

    Of a pair: (1−α)·target + α·source (§V); without `alpha`, or of more than two, the uniform mean; with `fisher`, one
    for each policy, Σ F_i θ_i / Σ F_i entry by entry (eq. 4), the mean where all F_i are 0 (the original divides 0 by
    0). α = 0 gives the target's parameters and α = 1 the source's bit for bit, and mean and Fisher are bit for bit the
    same in whatever order the policies come, so several targets end up with one and the same shared group.

    Raises UserError for fewer than two policies, different architectures, α outside [0, 1], α with more than two
    policies or with Fisher, policies whose tasks do not share one trunk, or an unknown group.
    """
    target = _target(policies)
    if alpha is not None and (len(policies) != 2 or fisher is not None):
        raise UserError(
            f"alpha weighs a pair; {len(policies)} policies{' with Fisher' if fisher else ''} take their mean "
            "(leave alpha out)"
        )
    if alpha is not None and not 0 <= alpha <= 1:
        raise UserError(f"alpha must lie in [0, 1], {alpha} given")
    if fisher is not None and len(fisher) != len(policies):
        raise UserError(f"a Fisher merge takes one Fisher for each policy: {len(fisher)} for {len(policies)} given")
    names = parameters_of(group, target.architecture)
    if fisher is not None and not all(_weighs(each, target.trunk[name], name) for each in fisher for name in names):
        raise UserError(
            f"a Fisher merge takes finite numbers ≥ 0 for all of {group}: estimate every Fisher of its own policy"
        )

    def combine(name: str) -> Tensor:
        if alpha is not None:
            return _between(policies[0].trunk[name], policies[1].trunk[name], alpha)
        tensors = torch.stack([policy.trunk[name] for policy in policies])
        if fisher is not None:
            return _weighted(tensors, torch.stack([each[name] for each in fisher]))
        return _mean(tensors).float()

    return with_trunk(target, {name: combine(name) for name in names})


def merge_many(policies: Sequence[Policy], group: str, weights: Sequence[Sequence[float]]) -> list[Policy]:
    """Many mixtures of `group` of the same policies in one matrix product: Σ_p w_cp θ_p for each candidate c.

    weights: (C, P), ≥ 0, each row adding up to 1; [[1 − α, α] for α in …] sweeps a pair. What `merge` gives one by one
    up to float32 rounding (1e-7 of the largest parameter of the entry's place); a row that is all one policy's gives
    its parameters bit for bit. For screening: what is to be shared by several targets bit for bit takes `merge`, whose
    mean does not depend on the order. Everything else is the first policy's. All candidates lie in memory, as views of
    one matrix: cut longer sweeps into pieces.

    Raises UserError for policies that `merge` refuses, an unknown group, or other weights.
    """
    target = _target(policies)
    try:
        mix = torch.tensor(weights, dtype=torch.float64)
    except (TypeError, ValueError):
        mix = torch.zeros(0)
    if mix.ndim != 2 or mix.shape[1] != len(policies) or not bool(((mix >= 0).all(1) & _adds_up(mix.sum(1))).all()):
        raise UserError(f"weights are one row a candidate: {len(policies)} numbers ≥ 0, adding up to 1")
    names = parameters_of(group, target.architecture)
    shapes = {name: target.trunk[name].shape for name in names}
    parameters = torch.stack([flattened(policy.trunk, shapes) for policy in policies])  # (P, E)
    candidates = mix.float() @ parameters
    for candidate, chosen in (mix == 1).nonzero().tolist():  # bit for bit: the product turns −0 into 0
        candidates[candidate] = parameters[chosen]
    return [with_trunk(target, unflattened(row, shapes)) for row in candidates]


def _adds_up(total: Tensor) -> Tensor:
    return (total - 1).abs() < 1e-6


def _target(policies: Sequence[Policy]) -> Policy:
    """The first policy. Raises UserError when they cannot be merged."""
    if len(policies) < 2:
        raise UserError(f"merging takes at least two policies, {len(policies)} given")
    target = policies[0]
    for policy in policies[1:]:
        if policy.architecture != target.architecture:
            raise UserError(f"cannot merge different architectures: {target.architecture} with {policy.architecture}")
    if not all(policy.plain for policy in policies):
        raise UserError("cannot merge policies whose tasks have trunk parameters or masks of their own")
    return target


def _weighs(fisher: Fisher, tensor: Tensor, name: str) -> bool:
    weight = fisher.get(name)
    return weight is not None and weight.shape == tensor.shape and bool((weight.isfinite() & (weight >= 0)).all())


def _between(first: Tensor, second: Tensor, alpha: float) -> Tensor:
    """(1 − α)·first + α·second, and bit for bit one of them at the ends, where the formula would turn −0 into 0."""
    if alpha in (0.0, 1.0):
        return second if alpha else first
    return ((1 - alpha) * first).add_(alpha * second)


def _weighted(tensors: Tensor, weights: Tensor) -> Tensor:
    """Σ w·θ / Σ w over the first axis; the plain mean where all weights are 0. In float64, for Fishers are tiny."""
    weights = weights.double()
    total = _sum(weights)
    weighted = _sum(weights * tensors) / torch.where(total > 0, total, 1)
    return torch.where(total > 0, weighted, _mean(tensors)).float()


def _mean(tensors: Tensor) -> Tensor:
    """Over the first axis, in float64: thirds of three equal numbers would not add up to that number in float32."""
    return _sum(tensors.double()) / len(tensors)


def _sum(tensors: Tensor) -> Tensor:
    """Over the first axis, entry by entry from the smallest to the largest: the same bits in whatever order."""
    return tensors.sort(dim=0).values.sum(dim=0)


def assemble(policies: Mapping[str, Policy], shared: str | None = None) -> Policy:
    """One multi-task policy: `shared` once, everything else of each task from the task's own policy (§V-C).

    policies: task → the policy whose head and trunk it takes; shared: None where nothing need be. Raises UserError when
    the shared group is not bit for bit the same in all of them, or their architectures differ.
    """
    if len(policies) < 2:
        raise UserError(f"a multi-task policy is made of at least two policies, {len(policies)} given")
    alone = {task: policy.alone(task) for task, policy in policies.items()}
    first, *others = alone.values()
    for other in others:
        if other.architecture != first.architecture:
            raise UserError(f"cannot assemble different architectures: {first.architecture} with {other.architecture}")
    for name in parameters_of(shared, first.architecture) if shared else ():
        if not all(torch.equal(first.trunk[name], other.trunk[name]) for other in others):
            raise UserError(f"{name} is not the same in all policies: merge and freeze {shared} before the fine-tuning")
    common = {n: t for n, t in first.trunk.items() if all(torch.equal(t, other.trunk[n]) for other in others)}
    return Policy(
        first.architecture,
        common,
        {task: policy.heads[task] for task, policy in alone.items()},
        {task: {n: t for n, t in policy.trunk.items() if n not in common} for task, policy in alone.items()}
        if len(common) < len(first.trunk)
        else {},
    )


def perturb(policy: Policy, group: str, how: str, seed: int = 0) -> Policy:
    """Replace a group's parameters as Table I does (§V-B).

    random: those of a freshly initialised trunk, one draw fixed by `seed` for all policies of an architecture;
    identity: all-ones weights and zero biases (the paper's word; ones, not an identity matrix);
    removed: the sub-layer adds nothing to the residual stream, which zero output projections do exactly.

    Raises UserError on an unknown group or perturbation, a group that cannot be removed, or a policy whose tasks have
    trunk parameters or masks of their own.
    """
    if not policy.plain:
        raise UserError("cannot perturb a policy with trunk parameters or masks of single tasks: take one of its tasks")
    try:
        replacement = _REPLACEMENTS[how]
    except KeyError:
        raise unknown("perturbation", how, _REPLACEMENTS) from None
    return with_trunk(policy, replacement(policy, parameters_of(group, policy.architecture), seed))


def with_trunk(policy: Policy, changed: Mapping[str, Tensor]) -> Policy:
    """The policy with some trunk parameters replaced."""
    return replace(policy, trunk={**policy.trunk, **changed})


def _random(policy: Policy, names: Sequence[str], seed: int) -> dict[str, Tensor]:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # not the GPUs'
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
