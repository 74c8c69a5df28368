"""Many policies acting in many environments at once, each action exact, no work done twice.

Weights of all policies are stacked, so that one call serves them all (a product of oneDNN's for each, where it is
there). Of the 3K tokens of a window only three are new at each step, and the window slides without positions (time
steps are absolute), so embeddings and what the first block's attention reads are kept in a ring of K slots; deeper
layers see a context that lost its oldest step and are computed afresh. The last block computes the newest state token
alone. Where that is less work, attention looks at the tokens themselves and not at keys and values made of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from dt.errors import UserError
from dt.files import under
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

    blocks: per layer, `attn.c_attn` (P, 3d, d) or what `_absorbed` makes of it, and so on, with biases (P, 3d), in the
    precision of the products;
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

        def head(name: str) -> Tensor:
            return torch.stack([policy.heads[task.name][name] for policy in policies])

        def block(i: int) -> dict[str, Tensor]:
            """In the precision of the products, (P, out, in) as oneDNN likes its weights."""
            of_each = [_block(policy, i) for policy in policies]  # one by one: its bits must not depend on its company
            stacked = {name: torch.stack([tensors[name] for tensors in of_each]) for name in of_each[0]}
            turned = {name: tensor.mT if name.endswith("weight") else tensor for name, tensor in stacked.items()}
            return {name: tensor.to(_DTYPES[precision]).contiguous() for name, tensor in turned.items()}

        scale, shift = (
            torch.stack([policy.trunk[f"ln_f.{part}"] for policy in policies]) for part in ("weight", "bias")
        )
        predict = head("predict_action.weight").transpose(1, 2)
        last_shift = _small_product(shift[:, None], predict)[:, 0] + head("predict_action.bias")
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
                "predict.weight": scale[:, :, None] * predict,
                "predict.bias": last_shift[:, None],
            },
        )

    def select(self, policies: Tensor) -> Stack:
        """Only these policies, in this order."""

        def pick(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
            return {name: tensor[policies] for name, tensor in tensors.items()}

        return replace(self, blocks=tuple(map(pick, self.blocks)), head=pick(self.head))


class Actor:
    """P policies × E environments of one task, one time step after another."""

    def __init__(self, stack: Stack, episodes: int, action_dim: int) -> None:
        policies, k, d = len(stack.head["timestep"]), stack.architecture.context, stack.architecture.width
        self._stack, self._time = stack, 0
        dtype = stack.blocks[0]["mlp.c_fc.weight"].dtype
        # Rings over time steps of (return-to-go, state, action) tokens. In bfloat16 the residual stream is, too.
        self._tokens = torch.zeros(policies, episodes, k, 3, d, dtype=dtype)
        reads = _reads(self._tokens[:, :, 0], stack.blocks[0])  # for their widths
        self._reads = [torch.zeros(*self._tokens.shape[:4], each.shape[-1], dtype=dtype) for each in reads]
        self._blocked = _blocked_by_rotation(k)
        self._last_action = torch.zeros(policies, episodes, action_dim)

    def keep(self, policies: Tensor, episodes: Tensor) -> None:
        """Go on with these policies (P',) and, for each, these episodes (P', E')."""
        self._stack = self._stack.select(policies)
        rows = policies[:, None]
        self._tokens = self._tokens[rows, episodes]
        self._reads = [ring[rows, episodes] for ring in self._reads]
        self._last_action = self._last_action[rows, episodes]

    @torch.inference_mode()
    def act(self, observations: Tensor, returns_to_go: Tensor) -> Tensor:
        """Raw observations (P, E, S) and scaled returns-to-go (P, E), both float32 → actions (P, E, A)."""
        stack, k, heads = self._stack, self._stack.architecture.context, self._stack.architecture.heads
        now, filled = self._time % k, min(self._time + 1, k)
        self._push(observations, returns_to_go, now)
        x = self._tokens[:, :, :filled].flatten(2, 3)  # (P, E, T, d)
        blocked = self._blocked[now, : 3 * filled, : 3 * filled]
        newest = slice(3 * now + 1, 3 * now + 2)  # state token
        for block in stack.blocks:
            asking = newest if block is stack.blocks[-1] else slice(None)
            if block is stack.blocks[0]:
                queries, *seen = (ring[:, :, :filled].flatten(2, 3) for ring in self._reads)
                queries = queries[:, :, asking]
            else:
                queries, *seen = _reads(x, block, asking)
            mixed = _attend(queries, seen, blocked[asking], heads)
            x = _linear(mixed, block, "attn.c_proj", plus=x[:, :, asking])
            hidden = _linear(_norm(x), block, "mlp.c_fc", activation=stack.architecture.activation)
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
        for ring, fresh in zip((self._tokens, *self._reads), (new, *_reads(new, self._stack.blocks[0])), strict=True):
            ring[:, :, (now - 1) % context, 2] = fresh[:, :, 0]
            ring[:, :, now, :2] = fresh[:, :, 1:]


def _block(policy: Policy, i: int) -> dict[str, Tensor]:
    """Block i of a policy as `Stack` has it, in float32 and (in, out)."""
    architecture, scale = policy.architecture, (policy.architecture.width // policy.architecture.heads) ** -0.5
    trunk = under(f"h.{i}.", policy.trunk)

    def fold(norm: str, linear: str) -> tuple[Tensor, Tensor]:
        """(x̂·γ + β)W + b = x̂·(γW) + (βW + b)."""
        weight = trunk[f"{linear}.weight"]
        return trunk[f"{norm}.weight"][:, None] * weight, trunk[f"{norm}.bias"] @ weight + trunk[f"{linear}.bias"]

    def written(linear: str) -> tuple[Tensor, Tensor]:
        return _centred(trunk[f"{linear}.weight"]), _centred(trunk[f"{linear}.bias"])

    asked = torch.ones(3 * architecture.width)
    asked[: architecture.width] = scale  # queries come scaled, so that scores need not be
    weight, bias = fold("ln_1", "attn.c_attn")
    found = {
        "attn.c_attn": (weight * asked, bias * asked),
        "attn.c_proj": written("attn.c_proj"),
        "mlp.c_fc": fold("ln_2", "mlp.c_fc"),
        "mlp.c_proj": written("mlp.c_proj"),
    }
    if architecture.heads == 1 or 0 < i == architecture.layers - 1:  # one head, or one query: then it is less work
        found |= _absorbed(*found.pop("attn.c_attn"), *found["attn.c_proj"], architecture.heads)
    return {
        f"{linear}.{part}": each
        for linear, both in found.items()
        for part, each in zip(("weight", "bias"), both, strict=True)
    }


def _absorbed(
    c_attn: Tensor, c_attn_bias: Tensor, c_proj: Tensor, c_proj_bias: Tensor, heads: int
) -> dict[str, tuple[Tensor, Tensor]]:
    """Attention without keys and values: q·(W_k x) = (W_kᵀ q)·x, and, for attention adds up to 1, Σ a·(W_v x + b_v) =
    W_v (Σ a·x) + b_v. (What the keys' biases add to a score, softmax does not see.)

    So `attn.read` (d, heads·d) is W_kᵀ after W_q and `attn.c_proj` (heads·d, d) the projection after W_v, head by head.
    """
    width = len(c_attn)
    query, key, value = c_attn.view(width, 3, heads, -1).unbind(1)  # (d, heads, d/heads)
    query_bias, _, value_bias = c_attn_bias.view(3, heads, -1)
    projection = c_proj.view(heads, -1, width)
    return {
        "attn.read": (
            torch.einsum("ihe,ohe->iho", query, key).flatten(1),
            torch.einsum("he,ohe->ho", query_bias, key).flatten(),
        ),
        "attn.c_proj": (
            torch.einsum("ihe,heo->hio", value, projection).flatten(0, 1),
            torch.einsum("he,heo->o", value_bias, projection) + c_proj_bias,
        ),
    }


def _reads(x: Tensor, block: Mapping[str, Tensor], asking: slice = slice(None)) -> tuple[Tensor, ...]:
    """Tokens x (P, E, T, d) → the scaled queries of those that ask, and what they see: keys and values, or tokens."""
    normal = _norm(x)
    if "attn.read.weight" in block:
        return _linear(normal[:, :, asking], block, "attn.read"), normal
    return _linear(normal, block, "attn.c_attn").chunk(3, dim=-1)


def _blocked_by_rotation(context: int) -> Tensor:
    """(K, 3K, 3K) additive causal masks, float32: row `now` is for a ring whose newest time step lies in slot `now`."""
    slots, kinds = torch.arange(context), torch.arange(3)
    age_order = (slots[None] - slots[:, None] - 1) % context  # [now, slot]: 0 for the oldest
    order = (3 * age_order[:, :, None] + kinds).flatten(1)
    return torch.zeros(context, 3 * context, 3 * context).masked_fill_(order[:, None, :] > order[:, :, None], -1e9)


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
    *,
    activation: Activation | None = None,
    plus: Tensor | None = None,
) -> Tensor:
    """(P, E, T, in) → (P, E, T, out) by each policy's own weights, in their precision; then activated, or with `plus`
    (P, E, T, out) added."""
    weights, biases = block[f"{name}.weight"], block[f"{name}.bias"]
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


def _attend(queries: Tensor, seen: Sequence[Tensor], blocked: Tensor, heads: int) -> Tensor:
    """What queries find, in their shape, the same bits whatever P and E.

    Queries (P, E, Q, d) see keys and values, (P, E, T, d) each and split by heads; or queries (P, E, Q, heads·d) see
    tokens (P, E, T, d), where each head's query is one more of a single head's. blocked: (Q, T).
    """
    keys, values = seen[0], seen[-1]
    heads = heads if len(seen) == 2 else 1
    together, each = keys.shape[0] * keys.shape[1], keys.shape[3] // heads

    def split(x: Tensor) -> Tensor:
        return x.reshape(together, -1, heads, each).transpose(1, 2)

    q, k, v = split(queries), split(keys), split(values)
    if q[0, 0].numel() * k.shape[2] >= _SMALL:
        weights = F.softmax(q @ k.transpose(-1, -2) + blocked, dim=-1)  # float32, for bfloat16 takes thrice the time
        mixed = weights.to(v.dtype) @ v
    elif q.dtype == torch.float32:  # where the fused kernel's sums depend on P and E, on some CPUs
        scores = (q[:, :, :, None] * k[:, :, None]).sum(dim=-1) + blocked
        mixed = (F.softmax(scores, dim=-1)[..., None] * v[:, :, None]).sum(dim=-2)
    else:
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=blocked.to(q.dtype).expand(q.shape[2], -1), scale=1.0)
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
