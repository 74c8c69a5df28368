"""Checkpoints of the original code, whole modules pickled by `torch.save(model)`, as policies of ours.

A pickle is a program. Here it is run without the classes and functions it names: modules become objects that hold
nothing but their attributes, a tensor becomes a note of where its numbers lie in the file, all else is refused. Of the
numbers only those that act are read: not `wte`, `predict_state` and `predict_return`, nor the masks.
"""

import io
import math
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dt.errors import UserError, reason
from dt.model.architecture import BASE, Architecture
from dt.model.decision_transformer import Head
from dt.model.policy import STATISTICS, Policy
from dt.model.shapes import trunk_shapes
from dt.tasks import Task, get_task

_PACKAGES = ("decision_transformer.", "lm_cotraining.", "torch.nn.modules.", "transformers.")
# What lies in attributes that are not read. A file of `--outdir` holds its best return so far, a NumPy scalar.
_UNREAD = {
    *(("torch", name) for name in ("Size", "device", "bfloat16", "float16", "float32", "float64")),
    *((module, "scalar") for module in ("numpy.core.multiarray", "numpy._core.multiarray")),
    ("numpy", "dtype"),
    ("_codecs", "encode"),
}
_FLOATS = {"HalfStorage": "f2", "FloatStorage": "f4", "DoubleStorage": "f8"}  # as NumPy calls them
_ACTIVATIONS = ("relu", "gelu_new")


def read_original(
    path: Path,
    task: str,
    *,
    state_mean: NDArray[np.float32],
    state_std: NDArray[np.float32],
    best_return: float | None = None,
    unsaid: Architecture = BASE,
) -> Policy:
    """The policy in a `.pt` file of the original code; nothing the file holds is ever executed or imported.

    path: a module (`models/{env}/dt_gym-experiment-….pt`, `--outdir`) or a state dict, in torch's zip format.
    state_mean, state_std: (S,) of the dataset it was trained on, in the environment's units, which its file lacks;
    best_return: of that dataset, unscaled; None: the task's return target, which the original asks for.
    unsaid: heads, activation and context of a state dict, which does not tell; a module knows its own.

    The time table is `embed_timestep`, tied to `wpe` or not, cut to the task's horizon. Raises UserError
    when the file is missing, damaged or asks for anything no model needs, holds another model than a Decision
    Transformer of that task, or acts in ways a policy does not: multi-task, attention switched off, GEGLU.
    HalfCheetah and Walker2d have the same dimensions, so one is not told from the other.
    """
    settings = get_task(task)
    statistics = _statistics(settings, state_mean, state_std, best_return)
    if not path.is_file():
        raise UserError(f"no checkpoint at {path}")
    with _reading(path), _opened(path) as records:
        content = _Unpickler(io.BytesIO(records.read("data.pkl"))).load()
        located = _located(content)
        architecture = _architecture(content, located, unsaid)
        if table := located.get("embed_timestep.weight"):  # GPT-2's has 1024 rows, of which an episode uses 1000
            located["embed_timestep.weight"] = table._replace(
                size=(min(table.size[0], settings.horizon), *table.size[1:])
            )

        def read(name: str, shape: tuple[int, ...]) -> Tensor:
            if name not in located:
                raise ValueError(f"it has no {name}")
            if (found := tuple(located[name].size)) != shape:
                raise ValueError(f"its {name} is {found}, that of a policy for {task} is {shape}")
            return records.tensor(located[name])

        trunk = {name: read(f"transformer.{name}", shape) for name, shape in trunk_shapes(architecture).items()}
        head = {
            name: read(name.replace("predict_action.", "predict_action.0."), shape)  # theirs goes on with its tanh
            for name, shape in _head_shapes(settings, architecture.width).items()
        }
        return Policy(architecture, trunk, {task: head | statistics})


def _statistics(
    task: Task, mean: NDArray[np.float32], deviation: NDArray[np.float32], best_return: float | None
) -> dict[str, Tensor]:
    """What a head holds untrained. Raises UserError when it is not the task's."""
    for given in (mean, deviation):
        if given.shape != (task.state_dim,):
            raise UserError(
                f"the statistics given have shape {given.shape}, the states of {task.name} {(task.state_dim,)}: "
                "take them from a dataset of that task"
            )
    best = task.target_return if best_return is None else best_return
    values = dict(zip(STATISTICS, (mean, deviation, best), strict=True))
    return {name: torch.tensor(value, dtype=torch.float32) for name, value in values.items()}


def _head_shapes(task: Task, width: int) -> dict[str, tuple[int, ...]]:
    """Trained parameter of a head → shape."""
    with torch.device("meta"):  # draws no random number, takes no memory
        return {name: tuple(parameter.shape) for name, parameter in Head(task, width).named_parameters()}


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Turn whatever goes wrong in a foreign or damaged file into one sentence."""
    try:
        yield
    except Exception as error:
        raise UserError(
            f"cannot convert {path} ({reason(error)}): give a model of the original code for that task"
        ) from error


# --- what the pickle builds -------------------------------------------------------------------------------------------


class _Inert:
    """Stands in for an object of any class: made from any arguments, it keeps the attributes it is given, no more."""

    def __new__(cls, *_args: Any, **_kwargs: Any) -> "_Inert":
        return object.__new__(cls)

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, dict):  # a NumPy dtype's is a tuple
            vars(self).update(state)


class _Storage(NamedTuple):
    kind: str  # torch's name for the type of its numbers: "FloatStorage"
    key: str  # of the record in the file


class _Located(NamedTuple):
    """A tensor that is still in the file. Offset and strides count numbers, not bytes."""

    storage: _Storage
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]


class _Unpickler(pickle.Unpickler):
    """Builds `_Inert` and `_Located` in lists, dicts and sets. Any other global is refused before it is even imported.

    Classes and functions are handed out as fresh ones of our own, so that a crafted pickle can neither call nor alter
    anything else (BUILD sets attributes of whatever lies on the stack).
    """

    def find_class(self, module: str, name: str) -> Any:
        handed: dict[tuple[str, str], Callable[..., Any]] = {
            ("collections", "OrderedDict"): OrderedDict,
            ("builtins", "set"): set,
            ("__builtin__", "set"): set,  # in protocol 2, torch's own
            ("torch._utils", "_rebuild_tensor_v2"): lambda storage, offset, size, stride, *_: _Located(
                storage, offset, size, stride
            ),
            ("torch._utils", "_rebuild_parameter"): lambda tensor, *_: tensor,
        }
        if (module, name) in handed:
            return handed[module, name]
        if module == "torch" and name.isidentifier() and name.endswith("Storage"):
            return name
        if (module, name) in _UNREAD or f"{module}.".startswith(_PACKAGES):
            return type("Inert", (_Inert,), {})
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no model needs, so nothing of it was run")

    def persistent_load(self, identity: Any) -> _Storage:
        _, kind, key, *_ = identity  # ("storage", type, key, device, numbers)
        return _Storage(kind, key)


def _located(content: Any) -> dict[str, _Located]:
    """The parameters of a module, or the tensors of a state dict, by the names of the latter."""
    if isinstance(content, _Inert):
        if "embed_returns" in vars(content):
            raise ValueError("a multi-task model, two of whose three heads were never trained")
        return dict(_parameters(content))
    if isinstance(content, Mapping):
        return {name: value for name, value in content.items() if isinstance(value, _Located)}
    raise ValueError(f"it holds a {type(content).__name__}, neither a module nor a state dict")


def _parameters(module: _Inert, prefix: str = "") -> Iterator[tuple[str, _Located]]:
    for name, value in vars(module).get("_parameters", {}).items():
        if isinstance(value, _Located):
            yield f"{prefix}{name}", value
    for name, child in vars(module).get("_modules", {}).items():
        if isinstance(child, _Inert):
            yield from _parameters(child, f"{prefix}{name}.")


def _architecture(content: Any, located: Mapping[str, _Located], unsaid: Architecture) -> Architecture:
    """Width and layers from the tensors, the rest from the module's attributes where there are any."""
    if "transformer.ln_f.weight" not in located:
        raise ValueError("it has no transformer.ln_f.weight, so it is no Decision Transformer")
    (width,) = located["transformer.ln_f.weight"].size
    layers = sum(f"transformer.h.{i}.ln_1.weight" in located for i in range(len(located)))
    transformer = _attributes(_attributes(content).get("_modules", {}).get("transformer"))
    config = _attributes(transformer.get("config"))
    if transformer.get("disable_attention"):
        raise ValueError("its attention is switched off, which a policy cannot say")
    said = {
        "heads": config.get("n_head"),
        "activation": config.get("activation_function"),
        "context": _attributes(content).get("max_length"),
    }
    settings = unsaid.model_dump() | {name: value for name, value in said.items() if value is not None}
    if settings["activation"] not in _ACTIVATIONS:
        # differs from the original: its README speaks of GEGLU, its code has none, so which half is the gate is unknown
        raise ValueError(f"its activation is {settings['activation']}, not one of {' and '.join(_ACTIVATIONS)}")
    return Architecture(**settings | {"width": width, "layers": layers})


def _attributes(thing: Any) -> dict[str, Any]:
    return vars(thing) if isinstance(thing, _Inert) else {}


# --- torch's zip format -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Records:
    """The records of a file: `{root}/data.pkl`, `{root}/data/{key}`, and since torch 2.1 `{root}/byteorder`."""

    archive: zipfile.ZipFile
    root: str

    def read(self, name: str) -> bytes:
        """The bytes of a record."""
        return self.archive.read(f"{self.root}/{name}")

    def tensor(self, located: _Located) -> Tensor:
        """Its numbers, as float32, copied."""
        (kind, key), offset, size, stride = located
        if kind not in _FLOATS:
            raise ValueError(f"it has parameters of torch's type {kind}, not one of {', '.join(_FLOATS)}")
        big = f"{self.root}/byteorder" in self.archive.namelist() and self.read("byteorder") == b"big"
        numbers = np.frombuffer(self.read(f"data/{key}"), (">" if big else "<") + _FLOATS[kind]).astype(np.float32)
        if math.prod(size) > len(numbers):
            raise ValueError("a tensor in it is larger than its numbers")
        return torch.from_numpy(numbers).as_strided(size, stride, offset).clone(memory_format=torch.contiguous_format)


@contextmanager
def _opened(path: Path) -> Iterator[_Records]:
    if not zipfile.is_zipfile(path):
        with path.open("rb") as file:
            truncated = file.read(2) == b"PK"
        raise ValueError("it is truncated" if truncated else "it is not in the zip format torch saves in since 1.6")
    with zipfile.ZipFile(path) as archive:
        roots = [name.removesuffix("/data.pkl") for name in archive.namelist() if name.endswith("/data.pkl")]
        if len(roots) != 1:
            raise ValueError("it is a zip, but not one of torch.save")
        if any(info.compress_type != zipfile.ZIP_STORED for info in archive.infolist()):  # kilobytes become gigabytes
            raise ValueError("it is compressed, as torch.save never does")
        yield _Records(archive, roots[0])
