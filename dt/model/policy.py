"""A policy as a value: a trunk and one or more heads; the unit that is trained, merged, evaluated and saved."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from dt.errors import UserError
from dt.merging.groups import trunk_parameters
from dt.model.architecture import Architecture

FORMAT = "mergedt-policy-1"


@dataclass(frozen=True)
class Policy:
    """Parameters by name, float32. Treat the tensors as read-only: policies share them.

    trunk: GPT-2 names (`h.0.ln_1.weight`, …, `ln_f.bias`); heads: task → name → tensor.
    """

    architecture: Architecture
    trunk: Mapping[str, Tensor]
    heads: Mapping[str, Mapping[str, Tensor]]

    def __post_init__(self) -> None:
        expected = set(trunk_parameters(self.architecture))
        if expected != set(self.trunk):
            odd = sorted(expected.symmetric_difference(self.trunk))[0]
            raise UserError(f"not the trunk of {self.architecture}: {odd!r} is missing or unexpected")
        for name, shape in trunk_shapes(self.architecture).items():
            if tuple(self.trunk[name].shape) != shape:
                raise UserError(
                    f"wrong dimensions: trunk parameter {name!r} is {tuple(self.trunk[name].shape)}, "
                    f"the architecture ({self.architecture}) wants {shape}"
                )

    def arrays(self) -> dict[str, NDArray[np.float32]]:
        """All tensors as NumPy views under flat names: `trunk.h.0.…`, `heads.hopper.…`."""
        return {name: tensor.numpy() for name, tensor in _flat(self).items()}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, NDArray[np.float32]], architecture: Architecture) -> Policy:
        """The inverse of `arrays`, sharing memory with them."""
        return _unflat({name: torch.from_numpy(array) for name, array in arrays.items()}, architecture)


def trunk_shapes(architecture: Architecture) -> dict[str, tuple[int, ...]]:
    """Parameter name → shape, in depth order."""
    d, inner = architecture.width, architecture.mlp_width
    fc = 2 * inner if architecture.activation == "geglu" else inner
    weight = {"attn.c_attn": (d, 3 * d), "attn.c_proj": (d, d), "mlp.c_fc": (d, fc), "mlp.c_proj": (inner, d)}

    def shape(name: str) -> tuple[int, ...]:
        module, kind = name.rsplit(".", 1)
        module = module.removeprefix("h.").split(".", 1)[-1]  # "h.0.attn.c_attn" → "attn.c_attn"
        if module not in weight:
            return (d,)
        return weight[module] if kind == "weight" else weight[module][-1:]

    return {name: shape(name) for name in trunk_parameters(architecture)}


def save_policy(policy: Policy, path: Path, metadata: Mapping[str, str] | None = None) -> None:
    """Write a policy as safetensors, architecture and `metadata` in its header; a reader never sees half a file."""
    header = {"format": FORMAT, "architecture": policy.architecture.model_dump_json(), **(metadata or {})}
    tensors = {name: tensor.contiguous() for name, tensor in _flat(policy).items()}
    write_atomically(path, save(tensors, header))


def load_policy(path: Path) -> Policy:
    """Read a policy. Raises UserError on a missing, truncated or foreign file; nothing is ever unpickled."""
    if not path.is_file():
        raise UserError(f"no checkpoint at {path}")
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            if header.get("format") != FORMAT:
                raise UserError(f"{path} is not a mergedt policy (its header lacks format={FORMAT!r})")
            architecture = Architecture.model_validate_json(header["architecture"])
            return _unflat({name: file.get_tensor(name) for name in file.keys()}, architecture)  # noqa: SIM118
    except (SafetensorError, KeyError, ValidationError, json.JSONDecodeError) as error:
        raise UserError(
            f"{path} is truncated or corrupt ({error}): delete it and run the same command again"
        ) from error


def write_atomically(path: Path, content: bytes) -> None:
    """Write to a temporary name beside `path`, flush to disk, rename. Raises UserError when the disk refuses."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise UserError(f"cannot write {path}: {error.strerror}") from error


def _flat(policy: Policy) -> dict[str, Tensor]:
    trunk = {f"trunk.{name}": tensor for name, tensor in policy.trunk.items()}
    heads = {f"heads.{task}.{name}": tensor for task, head in policy.heads.items() for name, tensor in head.items()}
    return trunk | heads


def _unflat(tensors: Mapping[str, Tensor], architecture: Architecture) -> Policy:
    trunk: dict[str, Tensor] = {}
    heads: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        part, rest = name.split(".", 1)
        if part == "trunk":
            trunk[rest] = tensor
        else:
            task, parameter = rest.split(".", 1)
            heads.setdefault(task, {})[parameter] = tensor
    return Policy(architecture, trunk, heads)
