"""Merging against formulas in float64 NumPy, and what must never change."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import permutations
from pathlib import Path

import numpy as np
import pytest
import torch

from dt.data.windows import Batch
from dt.errors import UserError
from dt.merging.groups import parameters_of, trunk_parameters, units
from dt.merging.merge import Fisher, assemble, merge, merge_many, perturb, with_trunk
from dt.model.architecture import Architecture
from dt.model.decision_transformer import DecisionTransformer
from dt.model.policy import Policy, load_policy, save_policy
from dt.model.size import size_of
from dt.tasks import get_task

ARCHITECTURE = Architecture(width=16, layers=3, context=4)
TASKS = ("hopper", "halfcheetah", "walker2d")


def policy(task: str, seed: int, architecture: Architecture = ARCHITECTURE) -> Policy:
    torch.manual_seed(seed)
    made = DecisionTransformer(architecture, [get_task(task)]).policy()
    trunk = {name: torch.randn(tensor.shape) for name, tensor in made.trunk.items()}
    return Policy(architecture, trunk, made.heads)


def importance(of: Policy, seed: int) -> Fisher:
    """Random numbers over many orders of magnitude, a third of them 0."""
    draw = torch.Generator().manual_seed(seed)
    return {
        name: torch.where(
            torch.rand(tensor.shape, generator=draw) < 1 / 3,
            torch.zeros(()),
            10 ** (torch.rand(tensor.shape, generator=draw) * 80 - 44),
        )
        for name, tensor in of.trunk.items()
    }


@pytest.fixture
def three() -> list[Policy]:
    return [policy(task, seed) for seed, task in enumerate(TASKS)]


@pytest.mark.parametrize(
    "group", ["attention", "mlp", "layernorm", "trunk", "attention+mlp", "h.1.attn", "h.2.mlp.c_fc+ln_f"]
)
def test_a_pair_is_interpolated_in_its_group_and_nowhere_else(three: list[Policy], group: str) -> None:
    target, source, _ = three
    before = {name: array.copy() for name, array in target.arrays().items()}
    merged = merge([target, source], group, alpha=0.3)
    for name in trunk_parameters(ARCHITECTURE):
        a, b = target.trunk[name].double().numpy(), source.trunk[name].double().numpy()
        if name in parameters_of(group, ARCHITECTURE):
            np.testing.assert_allclose(merged.trunk[name].numpy(), 0.7 * a + 0.3 * b, rtol=1e-6, atol=1e-6)
        else:
            assert merged.trunk[name] is target.trunk[name]
    assert merged.heads is target.heads
    assert all(np.array_equal(array, before[name]) for name, array in target.arrays().items())


def test_alpha_0_is_the_target_and_alpha_1_the_sources_group_bit_for_bit(three: list[Policy]) -> None:
    target, source, _ = three
    target.trunk["h.0.attn.c_attn.bias"][0] = -0.0
    for alpha, owner in ((0.0, target), (1.0, source)):
        merged = merge([target, source], "attention", alpha)
        for name in parameters_of("attention", ARCHITECTURE):
            assert merged.trunk[name].numpy().tobytes() == owner.trunk[name].numpy().tobytes()


def test_many_candidates_are_one_product(three: list[Policy]) -> None:
    """Against float64; one policy alone bit for bit; the pair's sweep as `merge` gives it."""
    three[0].trunk["h.0.mlp.c_fc.bias"][0] = -0.0
    weights = [[0.2, 0.3, 0.5], [1.0, 0.0, 0.0], [0.0, 0.0, 1.0], [1 / 3, 1 / 3, 1 / 3]]
    before = [{name: array.copy() for name, array in each.arrays().items()} for each in three]
    for row, candidate in zip(weights, merge_many(three, "attention+mlp", weights), strict=True):
        for name in trunk_parameters(ARCHITECTURE):
            if name in parameters_of("attention+mlp", ARCHITECTURE):
                values = np.stack([each.trunk[name].double().numpy() for each in three])
                expected = np.tensordot(np.array(row), values, axes=1)
                np.testing.assert_allclose(candidate.trunk[name].numpy(), expected, rtol=1e-5, atol=1e-6)
                if 1.0 in row:
                    assert (
                        candidate.trunk[name].numpy().tobytes() == three[row.index(1.0)].trunk[name].numpy().tobytes()
                    )
            else:
                assert candidate.trunk[name] is three[0].trunk[name]
        assert candidate.heads is three[0].heads
    for each, arrays in zip(three, before, strict=True):
        assert all(np.array_equal(array, arrays[name]) for name, array in each.arrays().items())
    alphas = np.linspace(0, 1, 9)
    for alpha, candidate in zip(alphas, merge_many(three[:2], "trunk", [[1 - a, a] for a in alphas]), strict=True):
        one = merge(three[:2], "trunk", float(alpha))
        assert all(torch.allclose(candidate.trunk[name], one.trunk[name], atol=1e-6) for name in one.trunk)


@pytest.mark.parametrize(
    "weights", [[[0.5, 0.6]], [[1.5, -0.5]], [[1.0]], [0.5, 0.5], [[float("nan"), 1.0]], [[1.0, 0.0], [1.0]], []]
)
def test_weights_that_make_no_mixture_are_refused(three: list[Policy], weights: list[list[float]]) -> None:
    with pytest.raises(UserError, match="one row a candidate: 2 numbers ≥ 0, adding up to 1"):
        merge_many(three[:2], "mlp", weights)


def test_many_take_their_uniform_mean(three: list[Policy]) -> None:
    merged = merge(three, "trunk")
    for name in trunk_parameters(ARCHITECTURE):
        expected = np.mean([p.trunk[name].double().numpy() for p in three], axis=0)
        np.testing.assert_allclose(merged.trunk[name].numpy(), expected, rtol=1e-5, atol=1e-6)


def test_fisher_weighs_each_entry_and_is_the_mean_where_nobody_knows(three: list[Policy]) -> None:
    """Σ F θ / Σ F (eq. 4), where the original's 0/0 gives NaN; subnormal and huge weights alike."""
    fisher = [importance(each, seed) for seed, each in enumerate(three)]
    merged = merge(three, "attention+mlp", fisher=fisher)
    for name in trunk_parameters(ARCHITECTURE):
        if name not in parameters_of("attention+mlp", ARCHITECTURE):
            assert merged.trunk[name] is three[0].trunk[name]
            continue
        weights = np.stack([each[name].double().numpy() for each in fisher])
        values = np.stack([each.trunk[name].double().numpy() for each in three])
        known = weights.sum(axis=0) > 0
        assert not name.endswith("weight") or not known.all()
        expected = np.average(values, axis=0, weights=np.where(known, weights, 1.0))
        assert merged.trunk[name].dtype == torch.float32
        np.testing.assert_allclose(merged.trunk[name].numpy(), expected, rtol=1e-5, atol=1e-6)


def test_no_order_of_the_policies_changes_a_bit_of_mean_or_fisher(three: list[Policy]) -> None:
    fisher = [importance(each, seed) for seed, each in enumerate(three)]

    def results(order: Sequence[int]) -> list[bytes]:
        policies, weights = [three[i] for i in order], [fisher[i] for i in order]
        merges = merge(policies, "trunk"), merge(policies, "trunk", fisher=weights)
        return [tensor.numpy().tobytes() for merged in merges for tensor in merged.trunk.values()]

    first = results((0, 1, 2))
    assert all(results(order) == first for order in permutations(range(3)))
    assert (
        merge(three[:2], "mlp")
        .trunk["h.0.mlp.c_fc.weight"]
        .equal(merge(three[1::-1], "mlp").trunk["h.0.mlp.c_fc.weight"])
    )


def test_policies_that_agree_stay_as_they_are(three: list[Policy]) -> None:
    """Bit for bit: (x + x + x)/3 in float32 is not x in one of seven cases."""
    agreeing = [with_trunk(each, three[0].trunk) for each in three]
    fisher = [importance(each, seed) for seed, each in enumerate(three)]
    for merged in (merge(agreeing, "trunk"), merge(agreeing, "trunk", fisher=fisher)):
        assert all(torch.equal(tensor, three[0].trunk[name]) for name, tensor in merged.trunk.items())


def shared(policies: Sequence[Policy], group: str) -> dict[str, Policy]:
    """By task, after the merge of a group."""
    return {
        task: merge([policies[i], *(p for j, p in enumerate(policies) if j != i)], group)
        for i, task in enumerate(TASKS[: len(policies)])
    }


def test_an_assembled_policy_is_each_of_its_parts_and_keeps_what_they_share_once(
    three: list[Policy], tmp_path: Path
) -> None:
    parts = shared(three, "attention")
    whole = assemble(parts, "attention")
    save_policy(whole, tmp_path / "whole")
    for made in (whole, load_policy(tmp_path / "whole")):
        assert not made.plain
        assert set(made.trunk) == set(parameters_of("attention", ARCHITECTURE))
        for task, part in parts.items():
            expected, alone = part.arrays(), made.alone(task).arrays()
            assert alone.keys() == expected.keys()
            assert all(array.tobytes() == expected[name].tobytes() for name, array in alone.items())
    shelf = assemble(dict(zip(TASKS, three, strict=True)))
    assert not shelf.trunk
    assert size_of(shelf).transformer == 3
    with pytest.raises(UserError, match=r"h.0.mlp.c_fc.weight is not the same in all policies: merge and freeze mlp"):
        assemble(parts, "mlp")
    with pytest.raises(UserError, match="at least two"):
        assemble({"hopper": parts["hopper"]}, "attention")
    with pytest.raises(UserError, match="different architectures"):
        assemble({"hopper": three[0], "walker2d": policy("walker2d", 0, Architecture(width=32))}, "attention")
    with pytest.raises(UserError, match="no head for walker2d"):
        assemble({"walker2d": three[0], "hopper": three[0]}, "attention")


def test_tensors_that_two_of_three_tasks_share_can_be_saved(three: list[Policy], tmp_path: Path) -> None:
    """Policies share tensors; a file must not."""
    base, other, third = three
    whole = assemble(
        {
            "hopper": base,
            "halfcheetah": with_trunk(other, base.trunk),
            "walker2d": merge([third, base], "attention", 1.0),
        },
        "attention",
    )
    save_policy(whole, tmp_path / "whole")
    read = load_policy(tmp_path / "whole")
    assert all(torch.equal(tensor, read.alone("halfcheetah").trunk[name]) for name, tensor in base.trunk.items())


@pytest.mark.parametrize(
    ("tasks", "group", "percent"),
    [(2, "attention+mlp", 100.26), (2, "attention", 166.69), (3, "attention+mlp", 100.52), (2, "trunk", 100.0)],
)
def test_sizes_are_the_papers(tasks: int, group: str, percent: float) -> None:
    """Table II; 166.69 is its 166.82 by the published architecture."""
    paper = Architecture()
    policies = [policy(task, seed, paper) for seed, task in enumerate(TASKS[:tasks])]
    size = size_of(assemble(shared(policies, group), group))
    assert size.transformer == pytest.approx(percent / 100, abs=5e-5)
    assert size.shared + size.specific == sum(
        tensor.numel()
        for name, tensor in policies[0].trunk.items()
        for _ in range(1 if name in parameters_of(group, paper) else tasks)
    )
    assert size.heads == sum((131_075 - 128, 132_614 - 128, 132_614 - 128)[:tasks])
    assert size.mask_bits == 0
    assert size.total == size.shared + size.specific + size.heads


def test_masks_hide_entries_from_a_task_and_cost_a_bit_each(tmp_path: Path) -> None:
    odd = Architecture(width=5, layers=1, context=2)  # numbers of entries that fill no bytes
    base, draw = policy("hopper", 0, odd), torch.Generator().manual_seed(0)
    masks = {name: torch.rand(tensor.shape, generator=draw) < 0.5 for name, tensor in base.trunk.items()}
    masked = Policy(
        odd, base.trunk, {**base.heads, "walker2d": policy("walker2d", 1, odd).heads["walker2d"]}, {}, {"hopper": masks}
    )
    save_policy(masked, tmp_path / "masked")
    for made in (masked, load_policy(tmp_path / "masked"), Policy.from_arrays(masked.arrays(), odd)):
        assert all(torch.equal(mask, made.masks["hopper"][name]) for name, mask in masks.items())
        assert all(torch.equal(t, base.trunk[n] * masks[n]) for n, t in made.alone("hopper").trunk.items())
        assert all(torch.equal(t, base.trunk[n]) for n, t in made.alone("walker2d").trunk.items())
        assert made.alone("hopper").plain
    entries = sum(tensor.numel() for tensor in base.trunk.values())
    size = size_of(masked)
    assert size.mask_bits == entries
    assert size.total == size.shared + size.heads + entries / 32
    assert size.transformer == 1 + 1 / 32
    for call in (lambda: merge([masked, masked], "mlp"), lambda: DecisionTransformer.from_policy(masked)):
        with pytest.raises(UserError, match="masks of their own"):
            call()


def test_units_cover_the_trunk_in_depth_order_once() -> None:
    """Facts §5.4: 19 fine units, 12 (+ ln_f) coarse."""
    fine, coarse = units(ARCHITECTURE, "fine"), units(ARCHITECTURE, "coarse")
    assert len(fine) == 19
    assert len(coarse) == 13
    assert fine[:6] == ("h.0.ln_1", "h.0.attn.c_attn", "h.0.attn.c_proj", "h.0.ln_2", "h.0.mlp.c_fc", "h.0.mlp.c_proj")
    assert coarse[:4] == ("h.0.ln_1", "h.0.attn", "h.0.ln_2", "h.0.mlp")
    for granularity in (fine, coarse):
        assert granularity[-1] == "ln_f"
        covered = [name for unit in granularity for name in parameters_of(unit, ARCHITECTURE)]
        assert covered == list(trunk_parameters(ARCHITECTURE))
    assert len(parameters_of("attention", ARCHITECTURE)) == len(parameters_of("mlp", ARCHITECTURE)) == 12
    assert len(parameters_of("layernorm", ARCHITECTURE)) == 14


def test_perturbations_of_table_1(three: list[Policy]) -> None:
    hopper, cheetah, _ = three
    names = parameters_of("attention", ARCHITECTURE)
    random = [perturb(p, "attention", "random", seed=7) for p in (hopper, cheetah)]
    assert all(torch.equal(random[0].trunk[name], random[1].trunk[name]) for name in names)  # one draw for all
    weight = random[0].trunk["h.0.attn.c_attn.weight"]
    assert float(weight.std()) == pytest.approx(0.02, rel=0.1)  # GPT-2's initialisation
    assert not torch.equal(weight, perturb(hopper, "attention", "random", seed=8).trunk["h.0.attn.c_attn.weight"])
    identity = perturb(hopper, "attention", "identity")
    assert all(bool((identity.trunk[name] == (1 if name.endswith("weight") else 0)).all()) for name in names)
    for changed in (*random, identity):
        assert torch.equal(changed.trunk["h.0.mlp.c_fc.weight"], hopper.trunk["h.0.mlp.c_fc.weight"]) == (
            changed.heads is hopper.heads
        )


def test_removed_attention_leaves_the_residual_stream_alone(three: list[Policy]) -> None:
    """Against a forward pass without the sub-layer: x := x, then x += MLP(ln_2(x))."""
    removed = perturb(three[0], "attention", "removed")
    model, plain = DecisionTransformer.from_policy(removed).eval(), DecisionTransformer.from_policy(three[0]).eval()
    batch = Batch(
        torch.randn(2, 4, 1),
        torch.randn(2, 4, 11),
        torch.randn(2, 4, 3),
        torch.arange(4).expand(2, 4),
        torch.ones(2, 4, dtype=torch.bool),
    )
    x = plain.heads["hopper"].place(plain.heads["hopper"].embed(batch), batch.timesteps)
    for block in plain.trunk.h:
        x = x + block.mlp(block.ln_2(x))
    expected = plain.heads["hopper"].act(plain.trunk.ln_f(x)[:, 1::3])
    torch.testing.assert_close(model("hopper", batch), expected)


def test_mistakes_are_named(three: list[Policy]) -> None:
    pair, weights = three[:2], {name: torch.zeros_like(tensor) for name, tensor in three[0].trunk.items()}
    both = assemble({one: policy(one, seed) for seed, one in enumerate(("hopper", "walker2d"))}, None)
    for call, sentence in [
        (lambda: merge(pair, "atention", 0.5), r"unknown group 'atention': did you mean 'attention'"),
        (lambda: merge(pair, "attention", 1.5), r"alpha must lie in \[0, 1\], 1.5 given"),
        (lambda: merge(pair, "attention", -0.1), r"alpha must lie in \[0, 1\]"),
        (lambda: merge(three, "attention", 0.5), r"alpha weighs a pair; 3 policies"),
        (lambda: merge(pair[:1], "attention", 0.5), r"at least two policies"),
        (lambda: merge([pair[0], policy("hopper", 0, Architecture(width=32))], "mlp", 0.5), r"different architectures"),
        (lambda: merge(pair, "mlp", 0.5, [weights, weights]), r"alpha weighs a pair; 2 policies with Fisher"),
        (lambda: merge(pair, "mlp", fisher=[weights]), r"one Fisher for each policy: 1 for 2"),
        (lambda: merge(pair, "mlp", fisher=[weights, {}]), r"for all of mlp"),
        (lambda: merge(pair, "mlp", fisher=[weights, {n: t[:1] for n, t in weights.items()}]), r"for all of mlp"),
        (lambda: merge(pair, "mlp", fisher=[weights, {n: t - 1 for n, t in weights.items()}]), r"numbers ≥ 0"),
        (lambda: merge(pair, "mlp", fisher=[weights, {n: t / 0 for n, t in weights.items()}]), r"finite numbers"),
        (lambda: perturb(pair[0], "attention", "shuffled"), r"unknown perturbation 'shuffled'"),
        (lambda: perturb(pair[0], "layernorm", "removed"), r"only attention and mlp"),
        (lambda: perturb(both, "attention", "random"), r"masks of single tasks: take one"),
        (lambda: replace(both, trunk={**both.trunk, **both.specific["hopper"]}), r"both shared and hopper's own"),
        (
            lambda: replace(pair[0], masks={"hopper": {"odd": torch.ones(2)}}),
            r"trunk parameter 'odd'",
        ),
    ]:
        with pytest.raises(UserError, match=sentence):
            call()
