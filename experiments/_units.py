"""The sub-layers of Figure 2: in depth order, with what they are."""

_KINDS = {"attn": "attention", "mlp": "mlp", "ln_1": "layernorm", "ln_2": "layernorm", "ln_f": "layernorm"}


def kind_of(unit: str) -> str:
    """`attention`, `mlp` or `layernorm`.

    >>> kind_of("h.0.attn.c_proj"), kind_of("ln_f")
    ('attention', 'layernorm')
    """
    return next(_KINDS[part] for part in unit.split(".") if part in _KINDS)
