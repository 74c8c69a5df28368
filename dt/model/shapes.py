"""The shapes of an architecture's parameters, without making any (nor importing torch)."""

from __future__ import annotations

import math
from functools import cache

from dt.merging.groups import parameters_of, trunk_parameters
from dt.model.architecture import Architecture
from dt.tasks import Task


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


def head_shapes(task: Task, width: int) -> dict[str, tuple[int, ...]]:
    """Tensor name → shape of a task's head, statistics included."""
    return {
        "embed_return.weight": (width, 1),
        "embed_return.bias": (width,),
        "embed_state.weight": (width, task.state_dim),
        "embed_state.bias": (width,),
        "embed_action.weight": (width, task.action_dim),
        "embed_action.bias": (width,),
        "embed_ln.weight": (width,),
        "embed_ln.bias": (width,),
        "embed_timestep.weight": (task.horizon, width),
        "predict_action.weight": (task.action_dim, width),
        "predict_action.bias": (task.action_dim,),
        "state_mean": (task.state_dim,),
        "state_std": (task.state_dim,),
        "best_return": (),
    }


@cache  # asked for every evaluation of a plan, of the same few architectures
def block_parameters(architecture: Architecture, group: str = "trunk") -> int:
    """Parameters of all blocks of one trunk, or of what a group has of them, without the final layer norm.

    >>> block_parameters(Architecture()), block_parameters(Architecture(), "attention")
    (594816, 198144)
    """
    shapes = trunk_shapes(architecture)
    return sum(math.prod(shapes[name]) for name in parameters_of(group, architecture) if name.startswith("h."))
