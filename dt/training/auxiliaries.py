"""Losses that keep a policy near the language model it began with (§IV-C, eq. 5): L_cos, L_LM and L_2.

L = L_MSE + λ1 L_cos + λ2 L_LM + λ3 L_2; each class satisfies `dt.training.objective.Auxiliary`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from dt.data.windows import Batch
from dt.errors import UserError
from dt.language.blocks import BLOCK, TextBlocks
from dt.language.model import LanguageModel, next_token_logits, next_token_loss
from dt.model.architecture import Architecture
from dt.model.decision_transformer import DecisionTransformer, Prediction
from dt.model.trunk import Trunk

Seen = Mapping[str, tuple[Batch, Prediction]]


class CosineToClusters(nn.Module):
    """L_cos: every embedded token is drawn towards the direction of the nearest cluster of the language's tokens.

    −mean over real tokens of max_c cos(token, centre_c). Differs from the original, which takes the maximum of products
    per coordinate and counts padding.
    """

    name = "cosine"
    directions: Tensor

    def __init__(self, centres: Tensor, weight: float = 0.1, decay: int | None = 5000) -> None:
        """centres (C, d); weight: λ1 at the start; decay: T of its schedule, None: constant.

        Raises UserError when there are no centres.
        """
        super().__init__()
        if not len(centres):
            raise UserError("the language model has no clusters: compute them before a policy is drawn towards them")
        self._weight, self._decay = weight, decay
        self.register_buffer("directions", F.normalize(centres.detach().clone(), dim=-1))

    def weight(self, step: int) -> float:
        """λ1·sigmoid(((T − step)/(T/10)) − 5): half at T/2, 0.7 % at T.

        Differs from the original: from 2T on, where it has fallen below 10⁻⁶ of λ1, it is 0 and costs no time.
        """
        if self._decay is None:
            return self._weight
        if step >= 2 * self._decay:
            return 0.0
        return self._weight / (1 + math.exp(5 - 10 * (self._decay - step) / self._decay))

    def loss(self, model: DecisionTransformer, seen: Seen, rng: np.random.Generator) -> Tensor:  # noqa: ARG002
        """Over the tokens of all tasks alike, a scalar in [−1, 1]."""
        nearest = torch.stack([self._summed(prediction.embedded, batch.mask) for batch, prediction in seen.values()])
        real = torch.stack([3 * batch.mask.sum() for batch, _ in seen.values()])
        return -nearest.sum() / real.sum()

    def _summed(self, embedded: Tensor, mask: Tensor) -> Tensor:
        """(B, K, 3, d), (B, K) → ()."""
        cosines = F.normalize(embedded, dim=-1) @ self.directions.T
        return (cosines.amax(dim=-1).float() * mask[..., None]).sum()


class CoTraining(nn.Module):
    """L_LM: the policy's trunk goes on predicting the next token of a text.

    Positions are the time-step table of the policy's head (one parameter, updated once a step, unlike the original's;
    facts, B7), which training has begun with the language model's; with several tasks, the table of one drawn anew at
    every step. The token embedding is a copy that learns on and is no part of the policy.
    """

    name = "language"

    def __init__(
        self,
        language_model: LanguageModel,
        tokens: NDArray[np.signedinteger[Any]],
        weight: float = 1.0,
        sequences: int = 2,
        block: int = BLOCK,
        decay_steps: int | None = None,
    ) -> None:
        """tokens: a corpus as the language model's tokenizer encodes it (N,); weight: λ2, which falls linearly to 0
        over `decay_steps` if given; sequences of `block` tokens a step: the original's are 1024 long, here the table's
        1000 rows are the most.

        Raises UserError for a text that is too short or of another vocabulary.
        """
        super().__init__()
        vocabulary = len(language_model.token_embedding)
        self._blocks, self._sequences = TextBlocks(tokens, block), sequences
        if int(tokens.max()) >= vocabulary:
            raise UserError(
                f"the text has a token {int(tokens.max())}, the language model knows {vocabulary}: "
                "encode it with the model's own tokenizer"
            )
        self._weight, self._decay_steps = weight, decay_steps
        self.token_embedding = nn.Parameter(language_model.token_embedding.detach().clone())

    def weight(self, step: int) -> float:
        """λ2, or λ2·(1 − step/decay_steps) and 0 from then on."""
        return self._weight * (1 - min(1.0, step / self._decay_steps)) if self._decay_steps else self._weight

    def loss(self, model: DecisionTransformer, seen: Seen, rng: np.random.Generator) -> Tensor:
        """The next token's mean cross-entropy, in nats."""
        table = model.head(list(seen)[rng.integers(len(seen))]).embed_timestep.weight
        batch = self._blocks.sample(self._sequences, len(table), rng)
        tokens, following, positions = (part.to(table.device) for part in batch)
        dropout = model.dropout if model.training else 0.0
        logits = next_token_logits(model.trunk, self.token_embedding, table, tokens, positions, dropout)
        return next_token_loss(logits, following)


class DistanceToStart(nn.Module):
    """L_2: how far the trunk's blocks have moved from where they began; `ln_f` is free, as in the original."""

    name = "distance"

    def __init__(
        self,
        architecture: Architecture,
        trunk: Mapping[str, Tensor],
        weight: float = 1e-4,
        formula: Literal["sum of norms", "norm"] = "sum of norms",
    ) -> None:
        """trunk: the start, by GPT-2's names; weight: λ3; formula: the original code's Σ over tensors of ‖θ − θ0‖₂, or
        the paper's ‖θ − θ0‖₂ over all of them at once.

        λ3 = 1 in the paper means the term is on: the gradient of every norm is λ3 long, and all are clipped to 0.25.
        """
        super().__init__()
        start = Trunk(architecture)
        start.load_state_dict(dict(trunk))
        self.start = start.h.requires_grad_(False)
        self._weight, self._formula = weight, formula

    def weight(self, step: int) -> float:  # noqa: ARG002
        """λ3."""
        return self._weight

    def loss(self, model: DecisionTransformer, seen: Seen, rng: np.random.Generator) -> Tensor:  # noqa: ARG002
        """A scalar, 0 at the start and with gradient 0 there."""
        pairs = zip(model.trunk.h.parameters(), self.start.parameters(), strict=True)
        norms = torch.stack([torch.linalg.vector_norm(now - then) for now, then in pairs])
        return norms.sum() if self._formula == "sum of norms" else torch.linalg.vector_norm(norms)
