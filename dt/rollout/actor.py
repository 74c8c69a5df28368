"""Many policies acting in many environments at once, each action exact, no work done twice.

Weights of all policies are stacked, so that one call serves them all (a product of oneDNN's for each, where it is
there). Of the 3K tokens of a window only three are
new at each step, and the window slides without positions (time steps are absolute), so embeddings and the first block's
queries, keys and values are kept in a ring of K slots; deeper layers see a context that lost its oldest step and are
computed afresh. The last block computes the newest state token alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from dt.errors import UserError
from dt.model.architecture import Activation, Architecture
from dt.model.policy import Policy
from dt.model.trunk import LAYER_NORM_EPS, activate
from dt.tasks import Task
from dt.training.optimisation import Precision

if TYPE_CHECKING:
    from collections.abc import Iterator

# Multiplications under which oneDNN declines a product; it then goes to a kernel whose sums depend on the batch size.
_SMALL = 16**3
# What oneDNN's linear map can do with its result, by our names of activations: it halves the time of an MLP.
_FUSED: Mapping[Activation | None, tuple[str, list[float], str]] = {
    None: ("none", [], ""),
    "relu": ("relu", [], ""),
    "gelu_new": ("gelu", [], "tanh"),
}
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Stack:
    """The weights of P policies side by side. Each layer norm's affine part is folded into the linear map after it.

    Whatever reads the residual stream is a layer norm, which does not see what all features have in common: that part
    is taken out of all that is written there. It would cost bfloat16 the digits of the rest (attention of nothing but
    ones, as in Table I, writes nothing else).

    blocks: per layer, `c_attn` (P, 3d, d) etc. with biases (P, 3d), in the precision of the products;
    head: embeddings and statistics (P, …) in float32.
    """

    architecture: Architecture
    blocks: tuple[Mapping[str, Tensor], ...]
    head: Mapping[str, Tensor]

    @classmethod
    def of(cls, policies: Sequence[Policy], task: Task, precision: Precision) -> Stack:
        """Stack policies of one architecture that all have a head for the task. Raises UserError otherwise."""
        architecture = policies[0].architecture
        for policy in policies:
            if policy.architecture != architecture:
                raise UserError(
                    f"evaluated together, policies need one architecture: {policy.architecture}, {architecture}"
                )
            if not policy.plain:
                raise UserError("take policies alone on the task: these have trunk parameters or masks of their own")

        def trunk(name: str) -> Tensor:
            return torch.stack([policy.trunk[name] for policy in policies])

        def head(name: str) -> Tensor:
            return torch.stack([policy.heads[task.name][name] for policy in policies])

        def fold(norm: str, linear: str) -> dict[str, Tensor]:
            """(x̂·γ + β)W + b = x̂·(γW) + (βW + b)."""
            scale, shift, weight = trunk(f"{norm}.weight"), trunk(f"{norm}.bias"), trunk(f"{linear}.weight")
            bias = torch.einsum("pi,pio->po", shift, weight) + trunk(f"{linear}.bias")
            return {"weight": (scale[:, :, None] * weight).mT, "bias": bias}

        def block(i: int) -> dict[str, Tensor]:
            attn, fc = fold(f"h.{i}.ln_1", f"h.{i}.attn.c_attn"), fold(f"h.{i}.ln_2", f"h.{i}.mlp.c_fc")
            tensors = {
                "c_attn.weight": attn["weight"],
                "c_attn.bias": attn["bias"],
                "c_fc.weight": fc["weight"],
                "c_fc.bias": fc["bias"],
            }
            for short in ("attn.c_proj", "mlp.c_proj"):
                weight, bias = trunk(f"h.{i}.{short}.weight"), trunk(f"h.{i}.{short}.bias")
                tensors |= {f"{short}.weight": _centred(weight).mT, f"{short}.bias": _centred(bias)}
            return {name: tensor.to(_DTYPES[precision]).contiguous() for name, tensor in tensors.items()}

        predict = head("predict_action.weight").transpose(1, 2)
        last_shift = torch.einsum("pi,pio->po", trunk("ln_f.bias"), predict) + head("predict_action.bias")
        return cls(
            architecture,
            tuple(block(i) for i in range(architecture.layers)),
            {
                "return.weight": head("embed_return.weight").transpose(1, 2),
                "state.weight": head("embed_state.weight").transpose(1, 2),
                "action.weight": head("embed_action.weight").transpose(1, 2),
                "bias": torch.stack([head(f"embed_{m}.bias") for m in ("action", "return", "state")], dim=1)[:, None],
                "ln.weight": head("embed_ln.weight")[:, None, None],
                "ln.bias": head("embed_ln.bias")[:, None, None],
                "timestep": head("embed_timestep.weight"),
                "state_mean": head("state_mean")[:, None],
                "state_std": head("state_std")[:, None],
                "predict.weight": trunk("ln_f.weight")[:, :, None] * predict,
                "predict.bias": last_shift[:, None],
            },
        )

    def select(self, policies: Tensor) -> Stack:
        """Only these policies, in this order."""
        pick = {name: tensor[policies] for name, tensor in self.head.items()}
        blocks = tuple({name: tensor[policies] for name, tensor in block.items()} for block in self.blocks)
        return replace(self, blocks=blocks, head=pick)


class Actor:
    """P policies × E environments of one task, one time step after another."""

    def __init__(self, stack: Stack, episodes: int, action_dim: int) -> None:
        policies, k, d = len(stack.head["timestep"]), stack.architecture.context, stack.architecture.width
        self._stack, self._time = stack, 0
        dtype = stack.blocks[0]["c_attn.weight"].dtype
        # Rings over time steps of (return-to-go, state, action) tokens. In bfloat16 the residual stream is, too.
        self._tokens = torch.zeros(policies, episodes, k, 3, d, dtype=dtype)
        self._qkv = torch.zeros(policies, episodes, k, 3, 3 * d, dtype=dtype)
        self._blocked = _blocked_by_rotation(k, dtype)
        self._last_action = torch.zeros(policies, episodes, action_dim)

    def keep(self, policies: Tensor, episodes: Tensor) -> None:
        """Go on with these policies (P',) and, for each, these episodes (P', E')."""
        self._stack = self._stack.select(policies)
        rows = policies[:, None]
        self._tokens = self._tokens[rows, episodes]
        self._qkv = self._qkv[rows, episodes]
        self._last_action = self._last_action[rows, episodes]

    @torch.inference_mode()
    def act(self, observations: Tensor, returns_to_go: Tensor) -> Tensor:
        """Raw observations (P, E, S) and scaled returns-to-go (P, E), both float32 → actions (P, E, A)."""
        stack, k = self._stack, self._stack.architecture.context
        now, filled = self._time % k, min(self._time + 1, k)
        self._push(observations, returns_to_go, now)
        x = self._tokens[:, :, :filled].flatten(2, 3)  # (P, E, T, d)
        qkv = self._qkv[:, :, :filled].flatten(2, 3)
        blocked = self._blocked[now, : 3 * filled, : 3 * filled]
        state_token = slice(3 * now + 1, 3 * now + 2)
        for i, block in enumerate(stack.blocks):
            read = state_token if i == len(stack.blocks) - 1 else slice(None)
            queries, keys_values = _queries_keys_values(block, x, read) if i else _split(qkv, read)
            mixed = _attend(queries, keys_values, blocked[read], stack.architecture.heads)
            x = _linear(mixed, block, "attn.c_proj", plus=x[:, :, read])
            hidden = _linear(_norm(x), block, "c_fc", activation=stack.architecture.activation)
            x = _linear(hidden, block, "mlp.c_proj", plus=x)
        features = _norm(x[:, :, 0].float())
        self._last_action = torch.tanh(
            _small_product(features, stack.head["predict.weight"]) + stack.head["predict.bias"]
        )
        self._time += 1
        return self._last_action

    def _push(self, observations: Tensor, returns_to_go: Tensor, now: int) -> None:
        """Embed the three new tokens: the last action, the return-to-go and the state; the oldest step goes."""
        head, context = self._stack.head, self._stack.architecture.context
        states = (observations - head["state_mean"]) / head["state_std"]
        modalities = (
            _small_product(self._last_action, head["action.weight"]),
            returns_to_go[:, :, None] * head["return.weight"],
            _small_product(states, head["state.weight"]),
        )
        embedded = torch.stack(modalities, dim=2) + head["bias"]  # (P, E, 3, d)
        times = torch.tensor([max(self._time - 1, 0), self._time, self._time])
        new = _norm(embedded) * head["ln.weight"] + head["ln.bias"] + head["timestep"][:, None, times]
        new = _centred(new).to(self._tokens.dtype)
        new_qkv = _linear(_norm(new), self._stack.blocks[0], "c_attn")
        for ring, fresh in ((self._tokens, new), (self._qkv, new_qkv)):
            ring[:, :, (now - 1) % context, 2] = fresh[:, :, 0]
            ring[:, :, now, :2] = fresh[:, :, 1:]


def _blocked_by_rotation(context: int, dtype: torch.dtype) -> Tensor:
    """(K, 3K, 3K) additive causal masks: row `now` is for a ring whose newest time step lies in slot `now`."""
    slots, kinds = torch.arange(context), torch.arange(3)
    age_order = (slots[None] - slots[:, None] - 1) % context  # [now, slot]: 0 for the oldest
    order = (3 * age_order[:, :, None] + kinds).flatten(1)
    return torch.zeros(context, 3 * context, 3 * context, dtype=dtype).masked_fill_(
        order[:, None, :] > order[:, :, None], -1e9
    )


def _small_product(x: Tensor, weight: Tensor) -> Tensor:
    """(P, E, in) · (P, in, out) → (P, E, out), each sum in the same order however many rows there are.

    Products this small take a kernel that depends on their size; the trunk's do not (see `fast_float32`).
    """
    return (x[..., None] * weight[:, None]).sum(dim=2)


def _centred(x: Tensor) -> Tensor:
    """Without what its features (the last dimension) have in common."""
    return x - x.mean(dim=-1, keepdim=True)


def _norm(x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], eps=LAYER_NORM_EPS)


def _linear(
    x: Tensor,
    block: Mapping[str, Tensor],
    name: str,
    outputs: slice = slice(None),
    *,
    activation: Activation | None = None,
    plus: Tensor | None = None,
) -> Tensor:
    """(P, E, T, in) → (P, E, T, out) by each policy's own weights, in their precision; then activated, or with `plus`
    (P, E, T, out) added."""
    weights, biases = block[f"{name}.weight"][:, outputs], block[f"{name}.bias"][:, outputs]
    if activation not in _FUSED or not _fusing(x.dtype):
        y = torch.baddbmm(biases[:, None], x.flatten(1, 2), weights.mT).reshape(*x.shape[:3], -1)
        y = y if activation is None else activate(y, activation)
        return y if plus is None else y + plus
    fused = torch.ops.mkldnn._linear_pointwise
    if plus is None:
        after = _FUSED[activation]
        made = [fused(own, weight, bias, *after) for own, weight, bias in zip(x, weights, biases, strict=True)]
    else:
        parts = zip(x, plus, weights, biases, strict=True)
        made = [fused.binary(own, to, weight, bias, "add") for own, to, weight, bias in parts]
    return made[0][None] if len(made) == 1 else torch.stack(made)


@cache
def _fusing(dtype: torch.dtype) -> bool:
    """Whether oneDNN is there for such numbers, and can do in one pass what takes PyTorch three."""
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    return dtype == torch.float32 or bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def _split(qkv: Tensor, read: slice) -> tuple[Tensor, Tensor]:
    width = qkv.shape[-1] // 3
    return qkv[:, :, read, :width], qkv[..., width:]


def _queries_keys_values(block: Mapping[str, Tensor], x: Tensor, read: slice) -> tuple[Tensor, Tensor]:
    normal, width = _norm(x), x.shape[-1]
    if read == slice(None):
        return _split(_linear(normal, block, "c_attn"), read)
    queries = _linear(normal[:, :, read], block, "c_attn", slice(0, width))
    return queries, _linear(normal, block, "c_attn", slice(width, None))


def _attend(queries: Tensor, keys_values: Tensor, blocked: Tensor, heads: int) -> Tensor:
    """Queries (P, E, Q, d), keys and values (P, E, T, 2d) → (P, E, Q, d), the same bits whatever P and E."""

    def split(x: Tensor) -> Tensor:
        return x.reshape(-1, x.shape[2], heads, x.shape[3] // heads).transpose(1, 2)  # (P·E, heads, ·, d/heads)

    q, (k, v) = split(queries), map(split, keys_values.chunk(2, dim=-1))
    scale = 1 / math.sqrt(q.shape[-1])
    if q[0, 0].numel() * k.shape[2] >= _SMALL:
        mixed = F.softmax(q @ k.transpose(-1, -2) * scale + blocked, dim=-1) @ v
    elif q.dtype == torch.float32:  # where the fused kernel's sums depend on P and E, on some CPUs
        scores = (q[:, :, :, None] * k[:, :, None]).sum(dim=-1) * scale + blocked
        mixed = (F.softmax(scores, dim=-1)[..., None] * v[:, :, None]).sum(dim=-2)
    else:
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=blocked)
    return mixed.transpose(1, 2).reshape(queries.shape)


@contextmanager
def _medium() -> Iterator[None]:
    former = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(former)


def fast_float32() -> AbstractContextManager[None]:
    """Route float32 products to oneDNN where that still is float32: on a CPU without AMX it is 1.6–2 times faster.

    Its products also do not depend on the number of rows, so a policy gets the same bits in whatever company.
    """
    return nullcontext() if torch.cpu._is_amx_tile_supported() else _medium()
