"""Named sets of trunk parameters: what a merge may touch.

Names are GPT-2's (`h.0.attn.c_attn.weight`). Groups follow the structure, never substrings, and hold parameters only.
"""

from collections.abc import Iterable
from typing import Literal

from dt.errors import unknown
from dt.model.architecture import Architecture

SUBLAYERS = {
    "ln_1": ("ln_1",),
    "attn": ("attn.c_attn", "attn.c_proj"),
    "ln_2": ("ln_2",),
    "mlp": ("mlp.c_fc", "mlp.c_proj"),
}
GROUPS = {"attention": ("attn",), "mlp": ("mlp",), "layernorm": ("ln_1", "ln_2")}

Granularity = Literal["coarse", "fine"]


def trunk_parameters(architecture: Architecture) -> tuple[str, ...]:
    """All parameter names of the trunk in depth order."""
    return tuple(name for unit in units(architecture, "fine") for name in _of_module(unit))


def units(architecture: Architecture, granularity: Granularity = "coarse") -> tuple[str, ...]:
    """The sub-layers in depth order: the x-axis of Figure 2.

    coarse: `ln_1, attn, ln_2, mlp` of every block, then `ln_f` (13 units for 3 layers); fine: attention and MLP split
    into their two linear maps (19 units).
    """
    per_block = (
        tuple(SUBLAYERS) if granularity == "coarse" else tuple(m for modules in SUBLAYERS.values() for m in modules)
    )
    return (*(f"h.{i}.{name}" for i in range(architecture.layers) for name in per_block), "ln_f")


def parameters_of(group: str, architecture: Architecture) -> tuple[str, ...]:
    """Parameter names of a group, in depth order.

    `group` is `attention`, `mlp`, `layernorm` (all, with ln_f), `trunk`, a unit of either granularity, or several
    joined by `+`. Raises UserError naming the nearest valid groups.
    """
    chosen = {name for part in group.split("+") for name in _parameters_of_one(part, architecture)}
    return tuple(name for name in trunk_parameters(architecture) if name in chosen)


def _parameters_of_one(part: str, architecture: Architecture) -> Iterable[str]:
    coarse, fine = units(architecture, "coarse"), units(architecture, "fine")
    if part == "trunk":
        return trunk_parameters(architecture)
    if part in GROUPS:
        of_blocks = [f"h.{i}.{name}" for i in range(architecture.layers) for name in GROUPS[part]]
        members = [*of_blocks, "ln_f"] if part == "layernorm" else of_blocks
        return [name for unit in members for name in _of_unit(unit)]
    if part in coarse or part in fine:
        return _of_unit(part)
    raise unknown("group", part, [*GROUPS, "trunk", *coarse, *fine])


def _of_unit(unit: str) -> Iterable[str]:
    *block, name = unit.split(".", 2)
    modules = [".".join([*block, module]) for module in SUBLAYERS[name]] if name in SUBLAYERS else [unit]
    return [name for module in modules for name in _of_module(module)]


def _of_module(module: str) -> tuple[str, str]:
    return (f"{module}.weight", f"{module}.bias")
