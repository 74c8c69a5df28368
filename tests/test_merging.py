"""Merging against formulas in float64 NumPy, and what must never change."""

import numpy as np
import pytest
import torch

from dt.data.windows import Batch
from dt.errors import UserError
from dt.merging.groups import parameters_of, trunk_parameters, units
from dt.merging.merge import merge, perturb
from dt.model.architecture import Architecture
from dt.model.decision_transformer import DecisionTransformer
from dt.model.policy import Policy
from dt.tasks import get_task

ARCHITECTURE = Architecture(width=16, layers=3, context=4)


def policy(task: str, seed: int, architecture: Architecture = ARCHITECTURE) -> Policy:
    torch.manual_seed(seed)
    made = DecisionTransformer(architecture, [get_task(task)]).policy()
    trunk = {name: torch.randn(tensor.shape) for name, tensor in made.trunk.items()}
    return Policy(architecture, trunk, made.heads)


@pytest.fixture
def three() -> list[Policy]:
    return [policy("hopper", 0), policy("halfcheetah", 1), policy("walker2d", 2)]


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


def test_many_take_their_uniform_mean(three: list[Policy]) -> None:
    merged = merge(three, "trunk")
    for name in trunk_parameters(ARCHITECTURE):
        expected = np.mean([p.trunk[name].double().numpy() for p in three], axis=0)
        np.testing.assert_allclose(merged.trunk[name].numpy(), expected, rtol=1e-5, atol=1e-6)


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
    x = plain.heads["hopper"].embed(batch)
    for block in plain.trunk.h:
        x = x + block.mlp(block.ln_2(x))
    expected = plain.heads["hopper"].act(plain.trunk.ln_f(x)[:, 1::3])
    torch.testing.assert_close(model("hopper", batch), expected)


def test_mistakes_are_named(three: list[Policy]) -> None:
    pair = three[:2]
    for call, sentence in [
        (lambda: merge(pair, "atention", 0.5), r"unknown group 'atention': did you mean 'attention'"),
        (lambda: merge(pair, "attention", 1.5), r"alpha must lie in \[0, 1\], 1.5 given"),
        (lambda: merge(pair, "attention", -0.1), r"alpha must lie in \[0, 1\]"),
        (lambda: merge(three, "attention", 0.5), r"alpha weighs a pair; 3 policies"),
        (lambda: merge(pair[:1], "attention", 0.5), r"at least two policies"),
        (lambda: merge([pair[0], policy("hopper", 0, Architecture(width=32))], "mlp", 0.5), r"different architectures"),
        (lambda: perturb(pair[0], "attention", "shuffled"), r"unknown perturbation 'shuffled'"),
        (lambda: perturb(pair[0], "layernorm", "removed"), r"only attention and mlp"),
    ]:
        with pytest.raises(UserError, match=sentence):
            call()
