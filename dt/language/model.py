"""A language model as a value, GPT-2's function of it, and how one is read from Hugging Face's files."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save
from tokenizers import ByteLevelBPETokenizer, Tokenizer
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from dt.errors import UserError, reason
from dt.files import expanded, opened, under, write_atomically
from dt.language.clusters import CLUSTERS, cluster_centres
from dt.language.hub import downloaded
from dt.model.architecture import Activation, Architecture
from dt.model.shapes import trunk_shapes
from dt.model.trunk import LAYER_NORM_EPS, Trunk

FORMAT = "mergedt-language-1"
POSITIONS = 1000  # rows that become the time-step table: the horizon of the robot tasks


@dataclass(frozen=True, eq=False)
class LanguageModel:
    """Parameters by GPT-2's names, float32, V tokens, P positions, width d. Treat the tensors as read-only.

    Raises UserError when a shape is not the architecture's.
    """

    architecture: Architecture  # its context means nothing here
    trunk: Mapping[str, Tensor]  # `h.0.ln_1.weight`, …, `ln_f.bias`
    token_embedding: Tensor  # (V, d), also the output's weight
    position_embedding: Tensor  # (P, d)
    clusters: Tensor  # (C, d), centres of the token embeddings; C = 0 until `with_clusters`
    tokenizer: str  # JSON; empty when unknown, which rules out co-training only

    def __post_init__(self) -> None:
        expected = trunk_shapes(self.architecture)
        if expected.keys() != self.trunk.keys():
            odd = sorted(expected.keys() ^ self.trunk.keys())[0]
            raise UserError(f"not the trunk of {self.architecture}: {odd!r} is missing or unexpected")
        wrong = [name for name, shape in expected.items() if tuple(self.trunk[name].shape) != shape]
        tables = {"tokens": self.token_embedding, "positions": self.position_embedding, "clusters": self.clusters}
        wrong += [
            name for name, table in tables.items() if table.ndim != 2 or table.shape[1] != self.architecture.width
        ]
        if wrong:
            raise UserError(f"wrong dimensions: {wrong[0]!r} of the language model does not fit {self.architecture}")

    @property
    def content_hash(self) -> str:
        """SHA-256 over all it holds but the clusters, which follow from the rest."""
        digest = hashlib.sha256(f"{self.architecture.model_dump_json()}{self.tokenizer}".encode())
        for name, tensor in sorted({**self.trunk, "wte": self.token_embedding, "wpe": self.position_embedding}.items()):
            digest.update(name.encode() + tensor.contiguous().numpy().tobytes())
        return digest.hexdigest()

    def with_clusters(self, count: int = CLUSTERS, seed: int = 0) -> LanguageModel:
        """The same with that many cluster centres. Raises UserError when there are fewer tokens."""
        return replace(self, clusters=cluster_centres(self.token_embedding, count, seed))

    def timestep_table(self, rows: int = POSITIONS) -> Tensor:
        """The first rows of the position table (rows, d), for a policy's time steps.

        A table that is too short continues with its rows from the third on, again and again (the original's
        `--extend_positions`). Differs from the original: the last row is filled, too.
        """
        table = self.position_embedding
        if len(table) < min(rows, 3):
            raise UserError(f"a position table of {len(table)} rows cannot be extended to {rows}: it needs at least 3")
        index = torch.arange(rows)
        return table[torch.where(index < len(table), index, 2 + (index - len(table)) % max(1, len(table) - 2))]


def next_token_logits(
    trunk: Trunk, token_embedding: Tensor, position_embedding: Tensor, tokens: Tensor, positions: Tensor, dropout: float
) -> Tensor:
    """GPT-2: token plus position, the trunk, and the token embeddings again as output weight.

    tokens, positions (B, T) int64, token_embedding (V, d), position_embedding (P, d) → (B, T, V). dropout: of the
    embeddings, 0 outside of training.
    """
    embedded = F.embedding(tokens, token_embedding) + F.embedding(positions, position_embedding)
    features = trunk(F.dropout(embedded, dropout), torch.ones_like(tokens, dtype=torch.bool))
    return F.linear(features, token_embedding)


def next_token_loss(logits: Tensor, following: Tensor) -> Tensor:
    """Mean cross-entropy in nats: logits (B, T, V), following (B, T) → ()."""
    return F.cross_entropy(logits.flatten(0, 1), following.flatten())


class LanguageNetwork(nn.Module):
    """A language model that can be trained, initialised as GPT-2 is: N(0, 0.02)."""

    def __init__(self, architecture: Architecture, vocabulary: int, positions: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.architecture, self.dropout = architecture, dropout
        self.trunk = Trunk(architecture, dropout)
        self.token_embedding = nn.Parameter(0.02 * torch.randn(vocabulary, architecture.width))
        self.position_embedding = nn.Parameter(0.02 * torch.randn(positions, architecture.width))

    def forward(self, tokens: Tensor, positions: Tensor | None = None) -> Tensor:
        """tokens (B, T) int64 → logits of the following ones (B, T, V); positions (B, T), None: 0, 1, …"""
        if positions is None:
            positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
        dropout = self.dropout if self.training else 0.0
        return next_token_logits(self.trunk, self.token_embedding, self.position_embedding, tokens, positions, dropout)

    def model(self, tokenizer: str) -> LanguageModel:
        """A snapshot of the parameters, detached from further training, without clusters."""
        state = {name: tensor.detach().cpu().clone() for name, tensor in self.state_dict().items()}
        return LanguageModel(
            self.architecture,
            under("trunk.", state),
            state["token_embedding"],
            state["position_embedding"],
            torch.zeros(0, self.architecture.width),
            tokenizer,
        )

    @classmethod
    def from_model(cls, model: LanguageModel, dropout: float = 0.0) -> LanguageNetwork:
        """A trainable copy."""
        network = cls(model.architecture, len(model.token_embedding), len(model.position_embedding), dropout)
        trunk = {f"trunk.{name}": tensor for name, tensor in model.trunk.items()}
        tables = {"token_embedding": model.token_embedding, "position_embedding": model.position_embedding}
        network.load_state_dict(trunk | tables)
        return network


def save_language_model(model: LanguageModel, path: Path, metadata: Mapping[str, str] | None = None) -> None:
    """Write as safetensors, architecture, tokenizer and `metadata` in the header; a reader never sees half a file."""
    header = {
        "format": FORMAT,
        "architecture": model.architecture.model_dump_json(),
        "tokenizer": model.tokenizer,
        **(metadata or {}),
    }
    tensors = {f"trunk.{name}": tensor for name, tensor in model.trunk.items()}
    tensors |= {name: getattr(model, name) for name in ("token_embedding", "position_embedding", "clusters")}
    write_atomically(path, save({name: tensor.contiguous() for name, tensor in tensors.items()}, header))


def load_language_model(path: Path) -> LanguageModel:
    """Read one. Raises UserError on a missing, truncated or foreign file; nothing is ever unpickled."""
    with opened(path, "language model", FORMAT) as (header, tensors):
        return LanguageModel(
            Architecture.model_validate_json(header["architecture"]),
            under("trunk.", tensors),
            tensors["token_embedding"],
            tensors["position_embedding"],
            tensors["clusters"],
            header["tokenizer"],
        )


# --- Hugging Face's files ---------------------------------------------------------------------------------------------

_ACTIVATIONS: Mapping[str, Activation] = {"gelu_new": "gelu_new", "gelu_pytorch_tanh": "gelu_new", "relu": "relu"}
_REQUIRED = {  # what the trunk computes, which is also GPT-2's default
    "layer_norm_epsilon": LAYER_NORM_EPS,
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "tie_word_embeddings": True,
}
_TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "merges.txt")


def from_hugging_face(folder_or_id: str, clusters: int = CLUSTERS) -> LanguageModel:
    """A GPT-2 from a folder of Hugging Face's files, or from the hub (`gpt2`); its parameters stay as they are.

    clusters: centres to compute over its tokens; 0: none. Reads `config.json`, `model.safetensors` (or
    `pytorch_model.bin`, tensors only) and, if there, `tokenizer.json` or `vocab.json` with `merges.txt`. Raises
    UserError when it cannot be fetched or read, or is no GPT-2.
    """
    folder = expanded(folder_or_id)
    if not folder.is_dir():
        otherwise = "give an existing folder that holds it"
        wanted = ("config.json", "model.safetensors", *_TOKENIZER_FILES)
        folder = downloaded(folder_or_id, "model", wanted, otherwise)
        if not (folder / "model.safetensors").is_file():
            folder = downloaded(
                folder_or_id, "model", ("config.json", "pytorch_model.bin", *_TOKENIZER_FILES), otherwise
            )
    architecture = _architecture(folder / "config.json")
    state = {name.removeprefix("transformer."): tensor.float() for name, tensor in _state_dict(folder).items()}
    try:
        trunk = {name: state[name] for name in trunk_shapes(architecture)}
        tokens, positions = state["wte.weight"], state["wpe.weight"]
    except KeyError as error:
        raise UserError(f"the weights in {folder} are no GPT-2's: {error.args[0]!r} is missing") from error
    empty = torch.zeros(0, architecture.width)
    model = LanguageModel(architecture, trunk, tokens, positions, empty, _tokenizer(folder))
    return model.with_clusters(clusters) if clusters else model


def _architecture(path: Path) -> Architecture:
    try:
        config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(config, dict):
            raise ValueError("it holds no names with values")
        kind, inner = config.get("model_type"), config.get("n_inner")
        activation = config.get("activation_function", "gelu_new")
        if kind != "gpt2":
            raise UserError(f"{path} describes a model of type {kind!r}: only GPT-2 fits a policy's trunk")
        if activation not in _ACTIVATIONS:
            raise UserError(f"{path} has activation_function {activation!r}: the trunk knows {', '.join(_ACTIVATIONS)}")
        if inner not in (None, 4 * config["n_embd"]):
            raise UserError(f"{path} has n_inner {inner}: the trunk wants four times n_embd")
        for key, value in _REQUIRED.items():
            if config.get(key, value) != value:
                raise UserError(f"{path} has {key} {config[key]}: the trunk wants {value}")
        return Architecture(
            width=config["n_embd"],
            layers=config["n_layer"],
            heads=config["n_head"],
            activation=_ACTIVATIONS[activation],
        )
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(
            f"cannot read {path} as a GPT-2's configuration ({reason(error)}): give a folder with one"
        ) from error


def _state_dict(folder: Path) -> dict[str, Tensor]:
    safe, pickled = folder / "model.safetensors", folder / "pytorch_model.bin"
    if not (safe.is_file() or pickled.is_file()):
        raise UserError(
            f"{folder} has neither model.safetensors nor pytorch_model.bin: give a folder with a whole model"
        )
    try:
        if safe.is_file():
            return load_file(safe)
        state: dict[str, Tensor] = torch.load(pickled, map_location="cpu", weights_only=True)
        if not all(isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in state.items()):
            raise TypeError("not named tensors")
        return state
    except Exception as error:  # zip, unpickler and safetensors each raise their own
        raise UserError(f"the weights in {folder} are truncated or hold more than tensors: fetch them again") from error


def _tokenizer(folder: Path) -> str:
    """Its JSON; empty when there is none. One that only co-training would refuse (without an end of text) is kept."""
    whole, vocabulary, merges = (folder / name for name in _TOKENIZER_FILES)
    try:
        if whole.is_file():
            text = whole.read_text(encoding="utf-8")
            Tokenizer.from_str(text)  # that it can be read
            return text
        if vocabulary.is_file() and merges.is_file():
            return str(ByteLevelBPETokenizer(str(vocabulary), str(merges)).to_str())
    except Exception as error:  # the library raises nothing narrower
        raise UserError(f"the tokenizer in {folder} cannot be read ({reason(error)}): fetch it again") from error
    return ""
