"""The sub-layers of Figure 2: in depth order, with what they are."""

from dt.merging.groups import Granularity, units
from dt.model.architecture import Architecture

GRANULARITY: Granularity = "fine"  # the two linear maps of attention and of MLP apart: 19 units for 3 layers

_KINDS = {"attn": "attention", "mlp": "mlp", "ln_1": "layernorm", "ln_2": "layernorm", "ln_f": "layernorm"}


def units_of(architecture: Architecture, granularity: Granularity = GRANULARITY) -> tuple[str, ...]:
    """Unit names in depth order."""
    return units(architecture, granularity)


def kind_of(unit: str) -> str:
    """`attention`, `mlp` or `layernorm`.

    >>> kind_of("h.0.attn.c_proj"), kind_of("ln_f")
    ('attention', 'layernorm')
    """
    return next(_KINDS[part] for part in unit.split(".") if part in _KINDS)
