"""Checkpoints of the original code: converted exactly, without its classes, and harmless whatever they hold."""

import operator
import os
import pickle
import sys
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from dt.data.windows import Batch
from dt.errors import UserError
from dt.model.architecture import Architecture
from dt.model.decision_transformer import DecisionTransformer
from dt.model.original import read_original
from dt.model.policy import Policy, load_policy, save_policy

pytestmark = pytest.mark.filterwarnings("error")

STATES, ACTIONS, WIDTH, LAYERS, CONTEXT = 11, 3, 8, 2, 5  # hopper's, and small
STATISTICS = {
    "state_mean": np.linspace(-1, 1, STATES, dtype=np.float32),
    "state_std": np.linspace(1, 2, STATES, dtype=np.float32),
}


# --- the original's modules, as far as they decide what a checkpoint holds and what an action is --------------------


class Conv1D(nn.Module):
    def __init__(self, d_out: int, d_in: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(d_in, d_out) * 0.3), nn.Parameter(torch.randn(d_out) * 0.1)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.bias


class NewGELUActivation(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(x, approximate="tanh")


class GPT2Config:
    def __init__(self, heads: int, activation: str) -> None:
        self.n_head, self.activation_function, self.torch_dtype = heads, activation, torch.float32


class GPT2Attention(nn.Module):
    def __init__(self, config: GPT2Config) -> None:
        super().__init__()
        self.register_buffer("bias", torch.tril(torch.ones(1, 1, 32, 32, dtype=torch.uint8)))
        self.register_buffer("masked_bias", torch.tensor(-1e4))
        self.num_heads, self.pruned_heads = config.n_head, set[int]()
        self.c_attn, self.c_proj = Conv1D(3 * WIDTH, WIDTH), Conv1D(WIDTH, WIDTH)
        self.attn_dropout = nn.Dropout(0.1)

    def forward(self, x: Tensor, padding: Tensor) -> Tensor:
        batch, tokens, _ = x.shape
        query, key, value = (
            part.view(batch, tokens, self.num_heads, -1).permute(0, 2, 1, 3)
            for part in self.c_attn(x).split(WIDTH, dim=2)
        )
        weights = query @ key.transpose(-1, -2) / float(value.size(-1)) ** 0.5
        weights = torch.where(self.bias[:, :, :tokens, :tokens].bool(), weights, self.masked_bias) + padding
        mixed = (torch.softmax(weights, dim=-1) @ value).permute(0, 2, 1, 3).reshape(batch, tokens, WIDTH)
        output: Tensor = self.c_proj(mixed)
        return output


class GPT2MLP(nn.Module):
    def __init__(self, config: GPT2Config) -> None:
        super().__init__()
        self.c_fc, self.c_proj = Conv1D(4 * WIDTH, WIDTH), Conv1D(WIDTH, 4 * WIDTH)
        self.act = NewGELUActivation() if config.activation_function == "gelu_new" else nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.c_proj(self.act(self.c_fc(x)))
        return output


class GPT2Block(nn.Module):
    def __init__(self, config: GPT2Config) -> None:
        super().__init__()
        self.ln_1, self.attn = nn.LayerNorm(WIDTH), GPT2Attention(config)
        self.ln_2, self.mlp = nn.LayerNorm(WIDTH), GPT2MLP(config)

    def forward(self, x: Tensor, padding: Tensor) -> Tensor:
        x = self.attn(self.ln_1(x), padding) + x
        output: Tensor = x + self.mlp(self.ln_2(x))
        return output


class GPT2Model(nn.Module):
    def __init__(self, config: GPT2Config) -> None:
        super().__init__()
        self.config, self.disable_attention = config, False
        self.wte, self.wpe = nn.Embedding(7, WIDTH), nn.Embedding(1024, WIDTH)
        self.h = nn.ModuleList([GPT2Block(config) for _ in range(LAYERS)])
        self.ln_f = nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
        padding = (1.0 - attention_mask[:, None, None, :].float()) * -1e4
        for block in self.h:
            x = block(x, padding)
        output: Tensor = self.ln_f(x)
        return output


class OriginalDecisionTransformer(nn.Module):
    def __init__(self, heads: int, activation: str, extend_positions: bool) -> None:
        super().__init__()
        self.max_length, self.hidden_size = CONTEXT, WIDTH
        self.transformer = GPT2Model(GPT2Config(heads, activation))
        self.embed_timestep = self.transformer.wpe if extend_positions else nn.Embedding(1000, WIDTH)
        self.embed_return = nn.Linear(1, WIDTH)
        self.embed_state, self.embed_action = nn.Linear(STATES, WIDTH), nn.Linear(ACTIONS, WIDTH)
        self.embed_ln = nn.LayerNorm(WIDTH)
        self.predict_state, self.predict_return = nn.Linear(WIDTH, STATES), nn.Linear(WIDTH, 1)
        self.predict_action = nn.Sequential(nn.Linear(WIDTH, ACTIONS), nn.Tanh())
        self.past_key_values: Any = None
        self.training_checkpoint_dict: dict[str, Any] = {}

    def forward(self, batch: Batch) -> Tensor:
        size, steps = batch.mask.shape
        modalities = (
            self.embed_return(batch.returns_to_go),
            self.embed_state(batch.states),
            self.embed_action(batch.actions),
        )
        stacked = torch.stack(modalities, dim=1).permute(0, 2, 1, 3).reshape(size, 3 * steps, WIDTH)
        tokens = self.embed_ln(stacked) + self.embed_timestep(batch.timesteps).repeat_interleave(3, dim=1)
        mask = torch.stack((batch.mask,) * 3, dim=1).permute(0, 2, 1).reshape(size, 3 * steps)
        x = self.transformer(tokens, mask).reshape(size, steps, 3, WIDTH).permute(0, 2, 1, 3)
        self.past_key_values = ((x[:, 0], x[:, 2]),)
        actions: Tensor = self.predict_action(x[:, 1])
        return actions


HOMES = {
    "transformers.pytorch_utils": (Conv1D,),
    "transformers.activations": (NewGELUActivation,),
    "transformers.models.gpt2.configuration_gpt2": (GPT2Config,),
    "decision_transformer.models.trajectory_gpt2": (GPT2Attention, GPT2MLP, GPT2Block, GPT2Model),
    "decision_transformer.models.decision_transformer": (OriginalDecisionTransformer,),
}


def save_original(content: Any, path: Path) -> Path:
    """`torch.save` while the original's modules can be imported; afterwards they cannot."""
    with pytest.MonkeyPatch.context() as patch:
        for home, classes in HOMES.items():
            for i in range(home.count(".") + 1):
                package = ".".join(home.split(".")[: i + 1])
                if not isinstance(sys.modules.get(package), _Fake):
                    patch.setitem(sys.modules, package, _Fake(package))
            for cls in classes:
                patch.setattr(cls, "__module__", home)
                setattr(sys.modules[home], cls.__qualname__, cls)
        torch.save(content, path)
    assert "decision_transformer" not in sys.modules
    return path


class _Fake(ModuleType):
    """A module of the original code."""


@pytest.fixture
def model() -> OriginalDecisionTransformer:
    return original()


def original(
    heads: int = 2, activation: str = "gelu_new", extend_positions: bool = False
) -> OriginalDecisionTransformer:
    torch.manual_seed(0)
    model = OriginalDecisionTransformer(heads, activation, extend_positions)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)  # no layer norm stays 1 and 0
    return model


def windows() -> Batch:
    mask = torch.arange(CONTEXT).expand(4, CONTEXT) >= torch.tensor([0, 1, 3, 4])[:, None]
    return Batch(
        torch.rand(4, CONTEXT, 1),
        torch.randn(4, CONTEXT, STATES),
        torch.rand(4, CONTEXT, ACTIONS) * 2 - 1,
        torch.randint(1000, (4, CONTEXT)),
        mask,
    )


def read(path: Path, task: str = "hopper", **more: Any) -> Policy:
    return read_original(path, task, **{**STATISTICS, **more})


def assert_acts_like(policy: Policy, model: OriginalDecisionTransformer) -> None:
    batch = windows()
    with torch.no_grad():
        theirs, ours = model(batch), DecisionTransformer.from_policy(policy).eval()("hopper", batch)
    assert (theirs - ours)[batch.mask].abs().max() < 1e-5
    assert theirs[batch.mask].std() > 0.1


def sentence(path: Path, *parts: str, **more: Any) -> None:
    with pytest.raises(UserError) as error:
        read(path, **more)
    message = str(error.value)
    assert "\n" not in message
    assert all(part in message for part in (str(path), *parts)), message


# --- conversion -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("heads", "activation", "tied"), [(1, "relu", False), (2, "gelu_new", False), (2, "relu", True)]
)
def test_a_module_converts_to_a_policy_that_acts_alike(heads: int, activation: str, tied: bool, tmp_path: Path) -> None:
    model = original(heads, activation, tied)
    model(windows())  # leaves keys and values behind, as in the original
    model.training_checkpoint_dict = {"best_metric": np.float64(3), "best_state_dict": model.state_dict()}
    policy = read(save_original(model, tmp_path / "dt_gym-experiment.pt"), best_return=3200.0)
    assert policy.architecture == Architecture(
        width=WIDTH, layers=LAYERS, heads=heads, activation=activation, context=CONTEXT
    )
    assert_acts_like(policy, model)
    head = policy.heads["hopper"]
    assert head["embed_timestep.weight"].shape == (1000, WIDTH)
    assert head["best_return"] == 3200
    for name, given in STATISTICS.items():
        assert np.array_equal(head[name].numpy(), given)
    save_policy(policy, tmp_path / "policy.safetensors")
    assert_acts_like(load_policy(tmp_path / "policy.safetensors"), model)


def test_a_state_dict_is_told_what_it_does_not_say(model: OriginalDecisionTransformer, tmp_path: Path) -> None:
    path = save_original(model.double().state_dict(), tmp_path / "model_1.pt")
    policy = read(path, unsaid=Architecture(heads=2, activation="gelu_new", context=CONTEXT))
    assert_acts_like(policy, model.float())
    assert policy.heads["hopper"]["best_return"] == 3600  # the target the original asks for
    assert read(path).architecture == Architecture(width=WIDTH, layers=LAYERS)


def test_either_byte_order_and_none_said(model: OriginalDecisionTransformer, tmp_path: Path) -> None:
    path = save_original(model, tmp_path / "little.pt")
    records = contents(path)
    del records["byteorder"]
    assert_acts_like(read(rewritten(records, tmp_path / "unsaid.pt")), model)
    swapped = {
        name: np.frombuffer(data, "<f4").byteswap().tobytes()
        if name.startswith("data/") and not len(data) % 4
        else data
        for name, data in records.items()
    }
    assert_acts_like(read(rewritten(swapped | {"byteorder": b"big"}, tmp_path / "big.pt")), model)


# --- models that are no policy of the task ----------------------------------------------------------------------------


def test_another_task_or_statistics_are_said(model: OriginalDecisionTransformer, tmp_path: Path) -> None:
    path = save_original(model, tmp_path / "model.pt")
    states = np.ones(17, np.float32)
    sentence(path, "embed_state.weight", "11", "17", task="walker2d", state_mean=states, state_std=states)
    with pytest.raises(UserError, match=r"statistics given have shape \(17,\)"):
        read(path, state_mean=states)
    with pytest.raises(UserError, match="no checkpoint at"):
        read(tmp_path / "absent.pt")


def test_models_that_act_otherwise_are_said(model: OriginalDecisionTransformer, tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    model.transformer.disable_attention = True
    sentence(save_original(model, path), "attention is switched off")
    model.transformer.disable_attention = False
    model.transformer.config.activation_function = "geglu"
    sentence(save_original(model, path), "activation is geglu")
    model.transformer.config.activation_function = "gelu_new"
    model.transformer.config.n_head = 3
    sentence(save_original(model, path), "(width 8 is not a multiple of heads 3)")
    model.transformer.config.n_head = 2
    model.predict_action = None  # --share_input_output_proj
    sentence(save_original(model, path), "no predict_action.0.weight")
    model.embed_returns = [nn.Linear(1, WIDTH)] * 3
    sentence(save_original(model, path), "multi-task", "never trained")
    sentence(save_original(nn.Sequential(nn.Linear(2, 2)), path), "no Decision Transformer")
    sentence(save_original([1, 2], path), "a list")


# --- damaged and malicious files --------------------------------------------------------------------------------------


def test_damaged_and_foreign_files_are_said(model: OriginalDecisionTransformer, tmp_path: Path) -> None:
    whole = save_original(model, tmp_path / "whole.pt").read_bytes()
    path = tmp_path / "bad.pt"
    for content, reason in (
        (whole[: len(whole) // 2], "truncated"),
        (b"", "zip format"),
        (bytes(np.random.default_rng(0).integers(256, size=1000, dtype=np.uint8)), "zip format"),
    ):
        path.write_bytes(content)
        sentence(path, reason)
    damaged = bytearray(whole)
    at = whole.index(model.embed_ln.weight.detach().numpy().tobytes())
    damaged[at] ^= 1
    path.write_bytes(damaged)
    sentence(path, "CRC")
    torch.save(model.embed_ln.state_dict(), path, _use_new_zipfile_serialization=False)
    sentence(path, "zip format")
    records = contents(tmp_path / "whole.pt")
    sentence(rewritten({"notes.txt": b"nothing"}, path), "not one of torch.save")
    sentence(rewritten(records, path, zipfile.ZIP_DEFLATED), "compressed")
    sentence(rewritten({"data.pkl": records["data.pkl"]}, path), "no item named")
    small = {name: data[:4] if name.startswith("data/") else data for name, data in records.items()}
    sentence(rewritten(small, path), "larger than its numbers")


class Malicious:
    """Pickled as a call."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> tuple[Any, ...]:
        return self.call


def attacks(mark: Path) -> Iterator[tuple[str, Malicious]]:
    code = f"open({str(mark)!r}, 'w')"
    yield "system", Malicious(os.system, f"touch {mark}")
    yield "exec", Malicious(exec, code)
    yield "eval", Malicious(eval, code)
    yield "getattr", Malicious(getattr, Malicious(__import__, "os"), "system")
    yield "attrgetter", Malicious(operator.attrgetter, "system")
    yield "torch.serialization.load", Malicious(torch.load, str(mark))
    yield "importlib.import_module", Malicious(__import__("importlib").import_module, "antigravity")


def test_a_malicious_pickle_does_nothing(model: OriginalDecisionTransformer, tmp_path: Path) -> None:
    mark, path = tmp_path / "mark", tmp_path / "bad.pt"
    for name, attack in attacks(mark):
        torch.save(attack, path)
        sentence(path, "it asks for", name)
        torch.save({**model.state_dict(), "more": [attack]}, path, pickle_protocol=4)
        sentence(path, "it asks for")
        model.embed_ln.extra = attack  # deep in a module's attributes
        sentence(save_original(model, path), "it asks for")
    assert not mark.exists()
    assert "antigravity" not in sys.modules


def call(module: str, name: str, *arguments: Any) -> bytes:
    """A pickle that calls a global."""
    head, tail = b"\x80\x02", f"c{module}\n{name}\n".encode()
    return head + tail + pickle.dumps(arguments, 2)[2:-1] + b"R."


def test_what_only_a_crafted_pickle_asks_for(model: OriginalDecisionTransformer, tmp_path: Path) -> None:
    path, mark = tmp_path / "bad.pt", tmp_path / "mark"
    alter = b"\nN}U\x07__new__K\x01s\x86b."  # BUILD: sets an attribute of what was asked for
    for pickled, reason in (
        (call("decision_transformer.models.evil", "system", f"touch {mark}"), "no Decision Transformer"),
        (call("torch.nn.modules.module.os", "system", f"touch {mark}"), "no Decision Transformer"),
        (call("transformers_evil", "system", f"touch {mark}"), "transformers_evil.system"),
        (b"\x80\x04\x8c\x0bcollections\x8c\x14OrderedDict.fromkeys\x93.", "collections.OrderedDict.fromkeys"),
        (b"\x80\x04\x8c\x0ctorch._utils\x8c\x1e_rebuild_tensor_v2.__globals__\x93.", "_rebuild_tensor_v2.__globals__"),
        (call("torch._utils", "_rebuild_device_tensor_from_numpy", 1), "_rebuild_device_tensor_from_numpy"),
        (call("copy_reg", "_reconstructor", 1, 2, 3), "_reconstructor"),
        (b"\x80\x02ccollections\nOrderedDict" + alter, "immutable"),
        (b"\x80\x02ctorch.nn.modules.linear\nLinear" + alter, "argument"),
        (b"\x80\x02ctorch._utils\n_rebuild_parameter" + alter, "it holds a function"),
    ):
        rewritten({"data.pkl": pickled}, path)
        sentence(path, reason)
    assert not mark.exists()
    assert_acts_like(read(save_original(model, path)), model)


def contents(path: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(path) as archive:
        return {name.split("/", 1)[1]: archive.read(name) for name in archive.namelist()}


def rewritten(records: Mapping[str, bytes], path: Path, compression: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in records.items():
            archive.writestr(f"archive/{name}", data)
    return path
