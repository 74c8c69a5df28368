"""The model against Hugging Face's GPT-2 and the parameter counts of the paper."""

import json

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from transformers import GPT2Config, GPT2Model

from dt.data.windows import Batch
from dt.errors import UserError
from dt.merging.groups import parameters_of, trunk_parameters
from dt.model.architecture import GPT2_SMALL, Architecture
from dt.model.decision_transformer import DecisionTransformer
from dt.model.policy import Policy, load_policy, save_policy
from dt.model.shapes import trunk_shapes
from dt.model.trunk import Block, Trunk, attention_bias
from dt.tasks import get_task

HOPPER = get_task("hopper")


def windows(task_dims: tuple[int, int], batch: int, context: int, seed: int = 0) -> Batch:
    """Random windows whose left part is padding, of differing length."""
    draw = torch.Generator().manual_seed(seed)
    state_dim, action_dim = task_dims
    lengths = torch.randint(1, context + 1, (batch,), generator=draw)
    return Batch(
        torch.randn(batch, context, 1, generator=draw),
        torch.randn(batch, context, state_dim, generator=draw),
        torch.randn(batch, context, action_dim, generator=draw),
        torch.randint(0, 1000, (batch, context), generator=draw),
        torch.arange(context) >= context - lengths[:, None],
    )


def randomised(module: nn.Module, seed: int) -> nn.Module:
    """Every parameter drawn anew, so that none stays at a value (0, 1) that would hide a mistake."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=draw) * 0.2)
    return module.eval()


def hugging_face(architecture: Architecture, activation: str) -> GPT2Model:
    config = GPT2Config(
        vocab_size=1,
        n_embd=architecture.width,
        n_layer=architecture.layers,
        n_head=architecture.heads,
        activation_function=activation,
        attn_pdrop=0.0,
        embd_pdrop=0.0,
        resid_pdrop=0.0,
        attn_implementation="eager",
    )
    model = randomised(GPT2Model(config), seed=1)
    nn.init.zeros_(model.wpe.weight)  # the Decision Transformer has no positional table
    return model


@pytest.mark.parametrize("activation", ["relu", "gelu_new"])
@pytest.mark.parametrize("heads", [1, 4])
def test_trunk_equals_hugging_face_gpt2_with_its_state_dict_loaded_unchanged(activation: str, heads: int) -> None:
    architecture = Architecture(width=64, layers=3, heads=heads, activation=activation)
    oracle = hugging_face(architecture, activation)
    state = {name: tensor for name, tensor in oracle.state_dict().items() if not name.startswith(("wte", "wpe"))}
    trunk = Trunk(architecture)
    trunk.load_state_dict(state)  # strict: names and layout must be the same
    tokens, real = torch.randn(5, 60, 64), windows((1, 1), 5, 20).mask.repeat_interleave(3, dim=1)
    expected = oracle(inputs_embeds=tokens, attention_mask=real.long()).last_hidden_state[real]
    found = trunk(tokens, real)[real]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    for output in (found, expected):
        (output * torch.linspace(-1, 1, 64)).square().sum().backward()
    theirs = dict(oracle.named_parameters())
    for name, parameter in trunk.named_parameters():
        assert parameter.grad is not None
        largest = float(parameter.grad.abs().max())
        torch.testing.assert_close(parameter.grad, theirs[name].grad, atol=1e-5 * largest, rtol=1e-4)


def test_dropout_of_attention_leaves_its_expectation() -> None:
    """With dropout, keys and values are computed; without, what they would give is."""
    architecture = Architecture(width=64, layers=1)
    tokens, real = torch.randn(9, 20, 64), torch.ones(9, 20, dtype=torch.bool)
    attention = Block(architecture, dropout=0.2).attn
    randomised(attention, seed=2)
    blocked = attention_bias(real, torch.float32)
    expected = attention(tokens, blocked, slice(None))
    attention.train()
    drawn = torch.stack([attention(tokens, blocked, slice(None)) for _ in range(1_000)])
    error = drawn.std(dim=0) / 1_000**0.5
    assert not torch.equal(drawn[0], drawn[1])
    assert ((drawn.mean(dim=0) - expected).abs() < 6 * error).all()


def test_decision_transformer_equals_a_forward_pass_written_out_from_the_facts() -> None:
    architecture = Architecture(width=32, layers=2, activation="gelu_new")
    model = randomised(DecisionTransformer(architecture, [HOPPER]), seed=2)
    oracle = hugging_face(architecture, "gelu_new")
    oracle.load_state_dict({**oracle.state_dict(), **model.trunk.state_dict()})
    batch, head = windows((11, 3), 4, 20), model.heads["hopper"]
    tokens = torch.zeros(4, 60, 32)
    for b in range(4):
        for k in range(20):
            time = head.embed_timestep.weight[batch.timesteps[b, k]]
            for kind, (layer, value) in enumerate(
                [
                    (head.embed_return, batch.returns_to_go[b, k]),
                    (head.embed_state, batch.states[b, k]),
                    (head.embed_action, batch.actions[b, k]),
                ]
            ):
                raw = layer.weight @ value + layer.bias
                normal = (raw - raw.mean()) / torch.sqrt(raw.var(unbiased=False) + 1e-5)
                tokens[b, 3 * k + kind] = (
                    normal * head.embed_ln.weight + head.embed_ln.bias + time
                )  # LN first, then time
    hidden = oracle(inputs_embeds=tokens, attention_mask=batch.mask.repeat_interleave(3, 1).long()).last_hidden_state
    expected = torch.tanh(hidden[:, 1::3] @ head.predict_action.weight.T + head.predict_action.bias)
    torch.testing.assert_close(model("hopper", batch)[batch.mask], expected[batch.mask], atol=1e-5, rtol=0)


def test_actions_do_not_see_the_future_or_the_padding() -> None:
    model = randomised(DecisionTransformer(Architecture(width=32, layers=2), [HOPPER]), seed=3)
    batch = windows((11, 3), 3, 20)
    before = model("hopper", batch)
    future = batch._replace(states=batch.states.clone(), actions=batch.actions.clone())
    future.states[:, 15:] += 1
    future.actions[:, 14:] += 1  # the action of step 14 comes after its state token
    torch.testing.assert_close(model("hopper", future)[:, :15][batch.mask[:, :15]], before[:, :15][batch.mask[:, :15]])
    padding = batch._replace(states=torch.where(batch.mask[..., None], batch.states, 7.0))
    torch.testing.assert_close(model("hopper", padding)[batch.mask], before[batch.mask])


def test_parameter_counts_and_group_shares_are_the_papers() -> None:
    """§V-A: about 596K in three layers, attention about 33 %; the facts give the exact standard and GEGLU counts."""

    def count(architecture: Architecture, group: str) -> int:
        shapes = trunk_shapes(architecture)
        return sum(
            torch.Size(shapes[name]).numel() for name in parameters_of(group, architecture) if "ln_f" not in name
        )

    base = Architecture()
    assert count(base, "trunk") == 594_816
    assert count(base, "attention") == 198_144
    assert round(100 * count(base, "attention") / count(base, "trunk"), 2) == 33.31
    assert round(100 * count(base, "layernorm") / count(base, "trunk"), 4) == 0.2582
    assert count(Architecture(activation="geglu"), "trunk") == 596_100
    assert count(Architecture(width=512, heads=4), "trunk") == 9_457_152
    assert count(GPT2_SMALL, "trunk") == 85_054_464
    for architecture in (base, Architecture(activation="geglu")):
        made = {name: tuple(tensor.shape) for name, tensor in Trunk(architecture).named_parameters()}
        assert made == trunk_shapes(architecture)
        assert tuple(made) == trunk_parameters(architecture)


def test_a_policy_survives_saving_and_damage_is_named(tmp_path) -> None:
    policy = DecisionTransformer(Architecture(width=16, layers=1), [HOPPER]).policy()
    path = tmp_path / "policy.safetensors"
    save_policy(policy, path, {"recipe": "{}"})
    loaded = load_policy(path)
    assert loaded.architecture == policy.architecture
    assert all(torch.equal(loaded.trunk[name], tensor) for name, tensor in policy.trunk.items())
    assert all(torch.equal(loaded.heads["hopper"][name], tensor) for name, tensor in policy.heads["hopper"].items())
    arrays = policy.arrays()
    assert Policy.from_arrays(arrays, policy.architecture).arrays().keys() == arrays.keys()

    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"truncated or corrupt.*delete it"):
        load_policy(path)
    with pytest.raises(UserError, match="no policy"):
        load_policy(tmp_path / "none.safetensors")
    save_file({"x": torch.zeros(1)}, path)
    with pytest.raises(UserError, match="not a mergedt policy"):
        load_policy(path)
    wrong = {"format": "mergedt-policy-1", "architecture": json.dumps({"width": 32, "layers": 1})}
    save_file({f"trunk.{name}": tensor for name, tensor in policy.trunk.items()}, path, wrong)
    with pytest.raises(UserError, match="wrong dimensions"):
        load_policy(path)


def test_a_model_made_from_a_policy_is_the_same_model() -> None:
    model = randomised(DecisionTransformer(Architecture(width=16, layers=1, activation="geglu"), [HOPPER]), seed=4)
    batch = windows((11, 3), 2, 20)
    again = DecisionTransformer.from_policy(model.policy()).eval()
    assert torch.equal(model("hopper", batch), again("hopper", batch))
