"""The trunk: GPT-2's transformer blocks and final layer norm, without a positional table (§II-A of the paper).

Parameter names and layout are GPT-2's (`h.0.attn.c_attn.weight` is (in, out), q, k, v side by side), so a Hugging Face
GPT-2 state dict loads unchanged; `wte` and `wpe` are not part of it.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from dt.model.architecture import Activation, Architecture

LAYER_NORM_EPS = 1e-5


class Linear(nn.Module):
    """GPT-2's linear map: weight (in, out), bias (out)."""

    def __init__(self, d_in: int, d_out: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(d_in, d_out))
        self.bias = nn.Parameter(torch.zeros(d_out))

    def forward(self, x: Tensor) -> Tensor:
        """(…, in) → (…, out)."""
        return affine(x, self.weight, self.bias)


def affine(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """x (…, in), weight (in, out), bias (out) → (…, out)."""
    if x.ndim == 2:  # no view of it, which autograd would copy where the result is changed in place
        return torch.addmm(bias, x, weight)
    return torch.addmm(bias, x.reshape(-1, x.shape[-1]), weight).view(*x.shape[:-1], -1)


def activate(hidden: Tensor, activation: Activation) -> Tensor:
    """The MLP's non-linearity, in place if it can be; GEGLU halves the last axis: gelu(gate)·value (Shazeer 2020)."""
    if activation == "relu":
        return F.relu(hidden, inplace=True)
    if activation == "gelu_new":
        return F.gelu(hidden, approximate="tanh")
    gate, value = hidden.chunk(2, dim=-1)
    return F.gelu(gate, approximate="tanh") * value


class Attention(nn.Module):
    """Multi-head self-attention: softmax(q kᵀ / √(d/heads)) v, then an output projection."""

    def __init__(self, architecture: Architecture, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = architecture.heads, dropout
        self.c_attn = Linear(architecture.width, 3 * architecture.width)
        self.c_proj = Linear(architecture.width, architecture.width)

    def forward(self, x: Tensor, blocked: Tensor, read: slice) -> Tensor:
        """x (B, T, d), blocked (B, 1, T, T) additive → (B, len(read), d), for the queries in `read` only."""
        few = x.shape[0] * x.shape[1] <= 2 * x.shape[2]  # for so few tokens, making the two matrices is more work
        if self.heads == 1 and not (few or (self.training and self.dropout)):
            return self._absorbed(x, blocked[:, 0, read], x[:, read])
        queries, keys, values = (
            self._split(part) for part in self.c_attn(x).chunk(3, dim=-1)
        )  # (B, heads, T, d/heads)
        scores = queries[:, :, read] @ keys.transpose(-1, -2) * (1 / math.sqrt(queries.shape[-1]))
        weights = F.softmax(scores + blocked[:, :, read], dim=-1)
        mixed = F.dropout(weights, self.dropout, self.training) @ values
        return F.dropout(self.c_proj(mixed.transpose(1, 2).flatten(2)), self.dropout, self.training)

    def _absorbed(self, x: Tensor, blocked: Tensor, asking: Tensor) -> Tensor:
        """The same of a single head, without keys and values: two products of a token and the width instead of four.

        q·(W_k x) = (q W_kᵀ)·x; and Σ a·(W_v x + b_v) = W_v (Σ a·x) + b_v, for attention, if none is dropped, adds up
        to 1. So W_q and W_kᵀ make one matrix, W_v and the output projection another. The keys' bias adds the same to
        all scores of a query, which softmax does not see. (Absorbed, as DeepSeek-V2 says of its latent attention.)
        """
        query, key, value = self.c_attn.weight.chunk(3, dim=1)
        query_bias, _, value_bias = self.c_attn.bias.chunk(3)
        scaled = key.T * (1 / math.sqrt(x.shape[-1]))
        scores = affine(asking, query @ scaled, query_bias @ scaled) @ x.transpose(-1, -2)
        mixed = F.softmax(scores + blocked, dim=-1) @ x
        return affine(mixed, value @ self.c_proj.weight, value_bias @ self.c_proj.weight + self.c_proj.bias)

    def _split(self, x: Tensor) -> Tensor:
        return x.reshape(*x.shape[:-1], self.heads, -1).transpose(1, 2)


class MLP(nn.Module):
    """Two linear maps with an activation between."""

    def __init__(self, architecture: Architecture, dropout: float) -> None:
        super().__init__()
        gated = 2 if architecture.activation == "geglu" else 1
        self.activation, self.dropout = architecture.activation, dropout
        self.c_fc = Linear(architecture.width, gated * architecture.mlp_width)
        self.c_proj = Linear(architecture.mlp_width, architecture.width)

    def forward(self, x: Tensor) -> Tensor:
        """(…, d) → (…, d)."""
        hidden = activate(self.c_fc(x.flatten(0, -2)), self.activation)
        return F.dropout(self.c_proj(hidden).view(x.shape), self.dropout, self.training)


class Block(nn.Module):
    """x += Attn(ln_1(x)); x += MLP(ln_2(x))."""

    def __init__(self, architecture: Architecture, dropout: float) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(architecture.width, eps=LAYER_NORM_EPS)
        self.attn = Attention(architecture, dropout)
        self.ln_2 = nn.LayerNorm(architecture.width, eps=LAYER_NORM_EPS)
        self.mlp = MLP(architecture, dropout)

    def forward(self, x: Tensor, blocked: Tensor, read: slice = slice(None)) -> Tensor:
        """(B, T, d) → (B, len(read), d)."""
        x = x[:, read] + self.attn(self.ln_1(x), blocked, read)
        y: Tensor = x + self.mlp(self.ln_2(x))
        return y


class Trunk(nn.Module):
    """The blocks and the final layer norm, initialised as GPT-2 is: N(0, 0.02), output projections / √(2·layers)."""

    def __init__(self, architecture: Architecture, dropout: float = 0.0) -> None:
        super().__init__()
        self.h = nn.ModuleList(Block(architecture, dropout) for _ in range(architecture.layers))
        self.ln_f = nn.LayerNorm(architecture.width, eps=LAYER_NORM_EPS)
        for name, parameter in self.named_parameters():
            if name.endswith(("c_attn.weight", "c_fc.weight")):
                nn.init.normal_(parameter, std=0.02)
            elif name.endswith("c_proj.weight"):
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * architecture.layers))

    def forward(self, x: Tensor, real: Tensor, read: slice = slice(None)) -> Tensor:
        """Tokens x (B, T, d), real (B, T) bool → (B, len(read), d).

        Causal; tokens that are not real are attended to by nobody else. `read` names the tokens whose output is wanted:
        the last block computes queries and MLP for those alone, which changes nothing but the time it takes.
        """
        blocked = attention_bias(real, x.dtype)
        *former, last = self.h
        for block in former:
            x = block(x, blocked)
        output: Tensor = self.ln_f(last(x, blocked, read))
        return output


def attention_bias(real: Tensor, dtype: torch.dtype) -> Tensor:
    """(B, T) bool → (B, 1, T, T): 0 where a query may look at a key, else a number softmax turns into 0.

    A padding token still looks at itself, so that no row of the softmax is empty; its output is never used.
    """
    tokens = real.shape[1]
    causal = torch.ones(tokens, tokens, dtype=torch.bool, device=real.device).tril()
    visible = causal & (real[:, None, :] | torch.eye(tokens, dtype=torch.bool, device=real.device))
    return ((visible.to(dtype) - 1) * 1e9)[:, None]
