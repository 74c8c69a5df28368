"""A policy acting in many environments at once, no work done twice.

Of the 3K tokens of a window only three are new at each step, and the window slides without positions (time steps are
absolute), so embeddings and what the first block's attention reads (its KV cache) are kept in a ring of K slots; deeper
layers see a context that lost its oldest step and are computed afresh. The last block computes the newest state token
alone. With one head, or in the last block with its one query, attention scores the tokens themselves instead of keys
made of them, and a single head's values come projected already (`_absorbed`).

A step is some hundred operations on arrays that just fit a core's cache, so operations are saved as much as
multiplications are. An actor holds one policy: stacking several gained nothing, for their products had to be copied
side by side.
"""

from __future__ import annotations

import platform
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from dt.bfloat16 import multiplies_bfloat16
from dt.files import under
from dt.model.architecture import Activation, Architecture
from dt.model.policy import Policy
from dt.model.trunk import LAYER_NORM_EPS, activate, affine
from dt.tasks import Task
from dt.training.optimisation import Precision

# What oneDNN's linear map can do with its result, by our names of activations: it halves the time of an MLP.
_FUSED: Mapping[Activation | None, tuple[str, list[float], str]] = {
    None: ("none", [], ""),
    "relu": ("relu", [], ""),
    "gelu_new": ("gelu", [], "tanh"),
}
DTYPES: Mapping[Precision, torch.dtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Weights:
    """A policy's weights on one task, made ready to act. Each layer norm's affine part is folded into the linear map
    after it, and weights are (out, in), as oneDNN likes them.

    Whatever reads the residual stream is a layer norm, which does not see what all features have in common: that part
    is taken out of all that is written there. It would cost bfloat16 the digits of the rest (attention of nothing but
    ones, as in Table I, writes nothing else).

    blocks: per layer, `attn.c_attn` (3d, d) or what `_absorbed` makes of it, and so on, with biases, in the precision
    of the products;
    head: embeddings and statistics in float32. `embed` (A + 1 + S, 3d) makes the tokens of the last action, of the
    return-to-go and of the state in one product; `time` (time steps, 3, d) is added to them. Weights are (in, out): for
    a product so small, oneDNN takes longer to begin than another library to end.
    """

    architecture: Architecture
    blocks: tuple[Mapping[str, Tensor], ...]
    head: Mapping[str, Tensor]

    @classmethod
    def of(cls, policy: Policy, task: Task, precision: Precision) -> Weights:
        """Of a policy alone on the task. Raises UserError if it has no head for it."""
        policy = policy.alone(task.name)
        architecture, given, dtype = policy.architecture, policy.heads[task.name], DTYPES[precision]
        modalities, times = ("action", "return", "state"), given["embed_timestep.weight"]
        scale, shift, predict = policy.trunk["ln_f.weight"], policy.trunk["ln_f.bias"], given["predict_action.weight"]

        def block(i: int) -> dict[str, Tensor]:
            turned = ((name, part.T if name.endswith("weight") else part) for name, part in _block(policy, i).items())
            return {name: part.to(dtype).contiguous() for name, part in turned}

        return cls(
            architecture,
            tuple(block(i) for i in range(architecture.layers)),
            {
                "embed.weight": torch.block_diag(  # type: ignore[no-untyped-call]
                    *(given[f"embed_{each}.weight"].T for each in modalities)
                ),
                "embed.bias": torch.cat([given[f"embed_{each}.bias"] for each in modalities]),
                "ln.weight": given["embed_ln.weight"],
                "ln.bias": given["embed_ln.bias"],
                "time": _centred(torch.stack([torch.cat([times[:1], times[:-1]]), times, times], dim=1)),
                "state_mean": given["state_mean"],
                "state_std": given["state_std"],
                "predict.weight": (predict * scale).T.contiguous() * architecture.width**0.5,
                # Not as a product, whose last bit may depend on where in memory its operands lie.
                "predict.bias": (predict * shift).sum(dim=1) + given["predict_action.bias"],
            },
        )


class Actor:
    """A policy in E environments of one task, one time step after another."""

    def __init__(self, weights: Weights, episodes: int) -> None:
        context, d = weights.architecture.context, weights.architecture.width
        self._weights, self._time = weights, 0
        dtype = weights.blocks[0]["mlp.c_fc.weight"].dtype
        # Rings over time steps of (last action, return-to-go, state) tokens; the residual stream has their precision.
        self._tokens = torch.zeros(episodes, 3 * context, d, dtype=dtype)
        self._reads = [torch.zeros_like(self._tokens) for _ in ("queries", "keys", "values")]
        self._blocked = _ring_masks(context).to(dtype)
        self._last_action = torch.zeros(episodes, len(weights.head["predict.bias"]))

    def keep(self, episodes: Tensor) -> None:
        """Forget all episodes but these, given by their present rows (E',)."""
        self._tokens = self._tokens[episodes]
        self._reads = [ring[episodes] for ring in self._reads]
        self._last_action = self._last_action[episodes]

    @torch.inference_mode()
    def act(self, observations: Tensor, returns_to_go: Tensor) -> Tensor:
        """Raw observations (E, S) and scaled returns-to-go (E,), both float32 → actions (E, A)."""
        weights, context = self._weights, self._weights.architecture.context
        heads, activation, head = weights.architecture.heads, weights.architecture.activation, weights.head
        now, tokens = self._time % context, 3 * min(self._time + 1, context)
        self._push(observations, returns_to_go, now)
        x = self._tokens[:, :tokens]
        blocked = self._blocked[now if tokens == 3 * context else -1, :tokens, :tokens]
        newest = slice(3 * now + 2, 3 * now + 3)  # state token
        for block in weights.blocks:
            asking = newest if block is weights.blocks[-1] else slice(None)
            if block is weights.blocks[0]:
                queries, keys, values = (ring[:, :tokens] for ring in self._reads)
                queries = queries[:, asking]
            else:
                queries, keys, values = _reads(x, block, asking)
            x = _attended(x[:, asking], queries, keys, values, blocked[asking], block, heads)
            hidden = _linear(_unit(x), block, "mlp.c_fc", activation=activation)
            x = _linear(hidden, block, "mlp.c_proj", plus=x)
        self._last_action = torch.tanh(affine(_unit(x[:, 0].float()), head["predict.weight"], head["predict.bias"]))
        self._time += 1
        return self._last_action

    def _push(self, observations: Tensor, returns_to_go: Tensor, now: int) -> None:
        """Embed the three new tokens: the last action, the return-to-go and the state; the oldest step goes."""
        head, d = self._weights.head, self._weights.architecture.width
        states = (observations - head["state_mean"]) / head["state_std"]
        known = torch.cat([self._last_action, returns_to_go[:, None], states], dim=1)
        embedded = affine(known, head["embed.weight"], head["embed.bias"]).view(-1, 3, d)
        normal = F.layer_norm(embedded, (d,), head["ln.weight"], head["ln.bias"], LAYER_NORM_EPS)
        new = (_centred(normal) + head["time"][self._time]).to(self._tokens.dtype)
        for ring, fresh in zip((self._tokens, *self._reads), (new, *_reads(new, self._weights.blocks[0])), strict=True):
            ring[:, 3 * now : 3 * now + 3] = fresh


def _block(policy: Policy, i: int) -> dict[str, Tensor]:
    """Block i of a policy as `Weights` has it, in float32 and (in, out)."""
    architecture, scale = policy.architecture, (policy.architecture.width // policy.architecture.heads) ** -0.5
    trunk = under(f"h.{i}.", policy.trunk)

    def fold(norm: str, linear: str) -> tuple[Tensor, Tensor]:
        """(x̂·γ + β)W + b = x̂/√d·(√d·γW) + (βW + b)."""
        weight = trunk[f"{linear}.weight"]
        gain = architecture.width**0.5 * trunk[f"{norm}.weight"][:, None]
        return gain * weight, trunk[f"{norm}.bias"] @ weight + trunk[f"{linear}.bias"]

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
    last = i == architecture.layers - 1
    # One head, or one query: then it is less work. (For several heads, the ring holds the first block's keys.)
    if architecture.heads == 1 or (last and i > 0):
        found |= _absorbed(*found.pop("attn.c_attn"), *found["attn.c_proj"], architecture.heads)
        if not last:
            found["attn.write"] = found.pop("attn.c_proj")
    return {
        f"{linear}.{part}": each
        for linear, both in found.items()
        for part, each in zip(("weight", "bias"), both, strict=True)
    }


def _absorbed(
    c_attn: Tensor, c_attn_bias: Tensor, c_proj: Tensor, c_proj_bias: Tensor, heads: int
) -> dict[str, tuple[Tensor, Tensor]]:
    """Attention without keys and values, by its QK and OV circuits: q·(W_k x) = (W_kᵀ q)·x, and, for attention adds up
    to 1, Σ a·(W_v x + b_v) = W_v (Σ a·x) + b_v. (What the keys' biases add to a score, softmax does not see.)

    So `attn.read` (d, heads·d) is W_kᵀ after W_q and `attn.c_proj` (heads·d, d) the projection after W_v, head by head.
    (Of one head and many queries, that projection is made of each token before it is looked at: `attn.write`.)
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


def _reads(x: Tensor, block: Mapping[str, Tensor], asking: slice = slice(None)) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens x (E, T, d) → the scaled queries of those that ask, and all keys and values, or what stands for them."""
    unit = _unit(x)
    if "attn.c_attn.weight" in block:
        queries, keys, values = _linear(unit, block, "attn.c_attn").chunk(3, dim=-1)
        return queries[:, asking], keys, values
    values = _linear(unit, block, "attn.write") if "attn.write.weight" in block else unit
    return _linear(unit[:, asking], block, "attn.read"), unit, values


def _ring_masks(context: int) -> Tensor:
    """(K, 3K, 3K) additive causal masks, float32: row `now` is for a full ring with its newest time step in slot `now`.

    The last row is also that of a ring that is filling, as far as it is full. Nobody looks at the oldest slot's action,
    which was taken before the window begins (but it at itself, so that no row of the softmax is empty).
    """
    slots, kinds = torch.arange(context), torch.arange(3)
    age_order = (slots[None] - slots[:, None] - 1) % context  # [now, slot]: 0 for the oldest
    order = (3 * age_order[:, :, None] + kinds).flatten(1)
    blocked = order[:, None, :] > order[:, :, None]
    blocked |= (order == 0)[:, None, :] & (order != 0)[:, :, None]
    return torch.zeros(context, 3 * context, 3 * context).masked_fill_(blocked, -1e9)


def _centred(x: Tensor) -> Tensor:
    """Less the mean of its features (the last dimension)."""
    return x - x.mean(dim=-1, keepdim=True)


def _unit(x: Tensor) -> Tensor:
    """Layer norm, over √d and without its affine part, of tokens that are centred: x / √(‖x‖² + d·ε)."""
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return x / torch.hypot(length, length.new_tensor((x.shape[-1] * LAYER_NORM_EPS) ** 0.5))


def _linear(
    x: Tensor,
    weights: Mapping[str, Tensor],
    name: str,
    *,
    activation: Activation | None = None,
    plus: Tensor | None = None,
) -> Tensor:
    """(…, in) → (…, out) in the weights' precision; then activated, or with `plus` (…, out) added."""
    weight, bias = weights[f"{name}.weight"], weights[f"{name}.bias"]
    if activation not in _FUSED or not _fusing(x.dtype):
        y = affine(x, weight.T, bias)
        y = y if activation is None else activate(y, activation)
        return y if plus is None else y + plus
    fused = torch.ops.mkldnn._linear_pointwise
    made: Tensor = (
        fused(x, weight, bias, *_FUSED[activation]) if plus is None else fused.binary(x, plus, weight, bias, "add")
    )
    return made


def _fusing(dtype: torch.dtype) -> bool:
    """Whether oneDNN is there for such numbers, and can do in one pass what takes PyTorch three."""
    if dtype == torch.bfloat16:
        return multiplies_bfloat16()
    return bool(torch.backends.mkldnn.is_available())  # type: ignore[no-untyped-call]


def _attended(
    x: Tensor, queries: Tensor, keys: Tensor, values: Tensor, blocked: Tensor, block: Mapping[str, Tensor], heads: int
) -> Tensor:
    """x (E, Q, d), and with it what its queries find. blocked: (Q, T).

    Queries (E, Q, d) see keys and values, (E, T, d) each and split by heads; or queries (E, Q, heads·d) see tokens
    (E, T, d), where each head's query is one more of a single head's.
    """
    absorbed = "attn.c_attn.weight" not in block
    if absorbed:
        q, k, v = queries.reshape(len(queries), -1, keys.shape[2]), keys, values
    else:
        q, k, v = (y.reshape(*y.shape[:2], heads, -1).transpose(1, 2).flatten(0, 1) for y in (queries, keys, values))
    scores = torch.baddbmm(blocked, q, k.mT)
    weights = F.softmax(scores, dim=-1, dtype=torch.float32).to(v.dtype)  # bfloat16's own takes thrice the time
    if "attn.write.weight" in block:
        return torch.baddbmm(x, weights, v)
    mixed = torch.bmm(weights, v)
    together = mixed if absorbed else mixed.reshape(len(x), heads, *mixed.shape[1:]).transpose(1, 2)
    return _linear(together.reshape(queries.shape), block, "attn.c_proj", plus=x)


@contextmanager
def fast_float32() -> Iterator[None]:
    """Route float32 products to oneDNN where that still is float32: with AVX-512 but no AMX, 1.6–2 times faster.

    PyTorch's "medium" allows bfloat16 inside, of which oneDNN makes use with AMX, and on Arm.
    """
    former = torch.get_float32_matmul_precision()
    if platform.machine() in ("x86_64", "AMD64") and not torch.cpu._is_amx_tile_supported():
        torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(former)
