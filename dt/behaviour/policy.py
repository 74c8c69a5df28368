"""The small behaviour policies that ship with the project: tanh-squashed Gaussians with two hidden layers."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from importlib.resources.abc import Traversable
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from safetensors.numpy import load

from dt.errors import UserError, unknown

Float32 = npt.NDArray[np.float32]
Quality = Literal["medium", "expert"]

LOG_STD_LIMITS = (-20.0, 2.0)
LAYERS = ("hidden_0", "hidden_1", "mean", "log_std")


@dataclass(frozen=True, eq=False)
class BehaviourPolicy:
    """What acts while a dataset is recorded."""

    weights: Mapping[str, Float32]  # `{layer}.weight` (out, in) and `{layer}.bias` (out,) for each of LAYERS
    provenance: Mapping[str, Any]  # how it was trained and what it scored
    digest: str  # SHA-256 of the weights' file

    def act(self, observations: Float32, noise: Float32 | None = None) -> Float32:
        """Actions (n, A) in [−1, 1] for observations (n, S): sampled by standard normal `noise` (n, A), else means."""
        hidden = np.maximum(self._linear("hidden_1", np.maximum(self._linear("hidden_0", observations), 0)), 0)
        mean = self._linear("mean", hidden)
        if noise is None:
            return np.tanh(mean)
        return np.tanh(mean + np.exp(np.clip(self._linear("log_std", hidden), *LOG_STD_LIMITS)) * noise)

    def _linear(self, layer: str, inputs: Float32) -> Float32:
        # Not `@`: BLAS rounds differently with another number of threads or rows, and a recording must not know either.
        # At these sizes the plain loop costs a tenth of the physics.
        product: Float32 = np.einsum("ni,oi->no", inputs, self.weights[f"{layer}.weight"])
        return product + self.weights[f"{layer}.bias"]


@cache
def load_behaviour_policy(task: str, quality: str) -> BehaviourPolicy:
    """The shipped policy. Raises UserError when none is shipped for that task or quality."""
    available = shipped_policies()
    if task not in {name for name, _ in available}:
        raise UserError(
            f"no behaviour policy is shipped for {task!r} (shipped: {', '.join(sorted({n for n, _ in available}))}): "
            "import a dataset for it, or train a policy with `mergedt behaviour train`"
        )
    if (task, quality) not in available:
        raise unknown("quality", quality, [known for name, known in available if name == task])
    weights = (_package() / f"{task}-{quality}.safetensors").read_bytes()
    provenance = json.loads((_package() / f"{task}-{quality}.json").read_text(encoding="utf-8"))
    return BehaviourPolicy(load(weights), provenance, hashlib.sha256(weights).hexdigest())


@cache
def shipped_policies() -> tuple[tuple[str, str], ...]:
    """All (task, quality) of which weights lie in this package, sorted."""
    names = (entry.name for entry in _package().iterdir())
    stems = (name.removesuffix(".safetensors") for name in names if name.endswith(".safetensors"))
    return tuple(sorted((task, quality) for task, _, quality in (stem.rpartition("-") for stem in stems)))


def _package() -> Traversable:
    return files("dt.behaviour")
