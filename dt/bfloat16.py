"""bfloat16 on processors that cannot multiply in it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dt.training.optimisation import Precision

_aten = torch.ops.aten
_PRODUCTS = frozenset(
    (_aten.mm.default, _aten.addmm.default, _aten.bmm.default, _aten.baddbmm.default, _aten.mv.default)
)  # whose positional arguments are all tensors


class ByWayOfFloat32(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """While it lasts, matrix products of bfloat16 numbers are float32 products of the same numbers, rounded; forward
    and backward, in this thread. (In inference mode only those that are called by the names above: `@` is not taken
    apart there.)

    A processor made for bfloat16 computes the same: its products sum up in float32, too, if in another order. PyTorch,
    on one that is not, falls back on loops that take ten times as long as its float32 products do.
    """

    def __torch_dispatch__(
        self,
        operation: Any,
        types: Sequence[type],
        arguments: Sequence[Any] = (),
        named: Mapping[str, Any] | None = None,
    ) -> Any:
        """Called for each of PyTorch's operations."""
        if operation not in _PRODUCTS or arguments[-1].dtype != torch.bfloat16:
            return operation(*arguments, **(named or {}))
        return operation(*(each.float() for each in arguments), **(named or {})).bfloat16()


@cache
def multiplies_bfloat16() -> bool:
    """Whether PyTorch has fast products of bfloat16 numbers here: on x86 with AVX-512, on Arm with BF16."""
    onednn: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    return onednn and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def products_in(precision: Precision, device: torch.device) -> AbstractContextManager[object]:
    """The context to compute in with that precision: by way of float32 on a CPU that cannot multiply in bfloat16."""
    helped = precision == "bfloat16" and device.type == "cpu" and not multiplies_bfloat16()
    return ByWayOfFloat32() if helped else nullcontext()  # type: ignore[no-untyped-call]
