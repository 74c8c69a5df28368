"""A policy as a value: a trunk and one or more heads; the unit that is trained, merged, evaluated and saved."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save
from torch import Tensor

from dt.errors import UserError
from dt.files import opened, write_atomically
from dt.model.architecture import Architecture
from dt.model.shapes import head_shapes, trunk_shapes
from dt.tasks import get_task

FORMAT = "mergedt-policy-1"
STATISTICS = ("state_mean", "state_std", "best_return")  # in a head, but not trained

PerTask = Mapping[str, Mapping[str, Tensor]]


@dataclass(frozen=True)
class Policy:
    """Parameters by name, float32. Treat the tensors as read-only: policies share them.

    trunk: GPT-2 names (`h.0.ln_1.weight`, …, `ln_f.bias`), what all tasks share; heads: task → name → tensor;
    specific: task → trunk parameters that are the task's own, absent from `trunk`; masks: task → trunk parameter →
    bool, False where the task sees a zero (HarmoDT). Most policies have neither of the latter.
    """

    architecture: Architecture
    trunk: Mapping[str, Tensor]
    heads: PerTask
    specific: PerTask = field(default_factory=dict)
    masks: PerTask = field(default_factory=dict)

    def __post_init__(self) -> None:
        expected = trunk_shapes(self.architecture)
        for task in self.heads or ("",):  # a trunk without heads is checked alone
            own = self.specific.get(task, {})
            if twice := sorted(self.trunk.keys() & own.keys()):
                raise UserError(f"trunk parameter {twice[0]!r} is both shared and {task}'s own")
            found = {**self.trunk, **own}
            if expected.keys() != found.keys():
                odd = sorted(expected.keys() ^ found.keys())[0]
                raise UserError(f"not the trunk of {self.architecture}: {odd!r} is missing or unexpected")
            for part in (found, self.masks.get(task, {})):
                for name, tensor in part.items():
                    if tuple(tensor.shape) != expected.get(name):
                        raise UserError(
                            f"wrong dimensions: trunk parameter {name!r} is {tuple(tensor.shape)}, "
                            f"the architecture ({self.architecture}) wants {expected.get(name, 'none')}"
                        )
        for task, head in self.heads.items():
            wanted = head_shapes(get_task(task), self.architecture.width)
            shapes = {name: tuple(tensor.shape) for name, tensor in head.items()}
            for name in sorted(wanted.keys() | shapes.keys()):
                if wanted.get(name) != shapes.get(name):
                    raise UserError(
                        f"wrong dimensions: {name!r} of the head for {task} is {shapes.get(name, 'missing')}, "
                        f"it should be {wanted.get(name, 'absent')}"
                    )

    def alone(self, task: str) -> Policy:
        """The single-task policy that this one is on a task. Raises UserError when it has no head for it."""
        self.check_head(task)
        trunk = {**self.trunk, **self.specific.get(task, {})}
        trunk |= {name: trunk[name] * mask for name, mask in self.masks.get(task, {}).items()}
        return Policy(self.architecture, trunk, {task: self.heads[task]})

    def check_head(self, task: str) -> None:
        """Raises UserError when there is none for the task."""
        if task not in self.heads:
            raise UserError(f"the policy has no head for {task}: its heads are {', '.join(self.heads)}")

    @property
    def plain(self) -> bool:
        """Whether all tasks use one and the same trunk."""
        return not (self.specific or self.masks)

    def arrays(self) -> dict[str, NDArray[np.float32] | NDArray[np.uint8]]:
        """All tensors as NumPy arrays under flat names: `trunk.h.0.…`, `heads.hopper.…`; masks as packed bits."""
        return {name: tensor.numpy() for name, tensor in _flat(self).items()}

    @classmethod
    def from_arrays(
        cls, arrays: Mapping[str, NDArray[np.float32] | NDArray[np.uint8]], architecture: Architecture
    ) -> Policy:
        """The inverse of `arrays`, sharing memory with them."""
        return _unflat({name: torch.from_numpy(array) for name, array in arrays.items()}, architecture)


def save_policy(policy: Policy, path: Path, metadata: Mapping[str, str] | None = None) -> None:
    """Write a policy as safetensors, architecture and `metadata` in its header; a reader never sees half a file."""
    header = {"format": FORMAT, "architecture": policy.architecture.model_dump_json(), **(metadata or {})}
    # copies, for safetensors refuses a tensor that two of the policy's tasks share
    tensors = {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in _flat(policy).items()}
    write_atomically(path, save(tensors, header))


def load_policy(path: Path) -> Policy:
    """Read a policy. Raises UserError on a missing, truncated or foreign file; nothing is ever unpickled."""
    with opened(path, "policy", FORMAT) as (header, tensors):
        return _unflat(tensors, Architecture.model_validate_json(header["architecture"]))


def _flat(policy: Policy) -> dict[str, Tensor]:
    flat = {f"trunk.{name}": tensor for name, tensor in policy.trunk.items()}
    for part, by_task in (("heads", policy.heads), ("specific", policy.specific)):
        flat |= {f"{part}.{task}.{name}": t for task, tensors in by_task.items() for name, t in tensors.items()}
    flat |= {f"masks.{task}.{name}": _packed(m) for task, masks in policy.masks.items() for name, m in masks.items()}
    return flat


def _unflat(tensors: Mapping[str, Tensor], architecture: Architecture) -> Policy:
    trunk: dict[str, Tensor] = {}
    per_task: dict[str, dict[str, dict[str, Tensor]]] = {"heads": {}, "specific": {}, "masks": {}}
    for flat_name, tensor in tensors.items():
        part, rest = flat_name.split(".", 1)
        if part == "trunk":
            trunk[rest] = tensor
        else:
            task, name = rest.split(".", 1)
            per_task[part].setdefault(task, {})[name] = tensor
    shapes = trunk_shapes(architecture)
    masks = {t: {n: _unpacked(m, shapes[n]) for n, m in by_name.items()} for t, by_name in per_task["masks"].items()}
    return Policy(architecture, trunk, per_task["heads"], per_task["specific"], masks)


def _packed(mask: Tensor) -> Tensor:
    """A bit an entry."""
    return torch.from_numpy(np.packbits(mask.numpy()))


def _unpacked(bits: Tensor, shape: tuple[int, ...]) -> Tensor:
    flat = np.unpackbits(bits.numpy(), count=math.prod(shape)).astype(bool)
    return torch.from_numpy(flat.reshape(shape))
