"""Pre-training on text: the next token's cross-entropy."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from dt.errors import UserError
from dt.language.blocks import BLOCK, TextBlocks
from dt.language.model import POSITIONS, LanguageModel, LanguageNetwork, next_token_loss
from dt.language.tokenizer import Tokenizer
from dt.model.architecture import Architecture
from dt.training.loop import TrainingState, in_precision, initialised
from dt.training.optimisation import Optimisation


class LanguageObjective:
    """The mean cross-entropy of the next token over `batch_size` random blocks, in nats."""

    def __init__(
        self, network: LanguageNetwork, blocks: TextBlocks, optimisation: Optimisation, tokenizer: Tokenizer
    ) -> None:
        self._network, self._blocks, self._optimisation, self._tokenizer = network, blocks, optimisation, tokenizer

    @property
    def name(self) -> str:
        """For messages."""
        return "the language model"

    @property
    def module(self) -> nn.Module:
        """The network."""
        return self._network

    def backward(self, step: int, rng: np.random.Generator) -> Mapping[str, Tensor]:  # noqa: ARG002
        """One batch of blocks."""
        table = self._network.position_embedding
        batch = self._blocks.sample(self._optimisation.batch_size, len(table), rng)
        tokens, following, positions = (part.to(table.device) for part in batch)
        with in_precision(self._optimisation, table.device):
            loss = next_token_loss(self._network(tokens, positions), following)
        loss.backward()  # type: ignore[no-untyped-call]
        return {"loss": loss.detach()}

    def updated(self, step: int, rng: np.random.Generator) -> None:
        """Nothing."""

    def diagnostics(self) -> Mapping[str, float]:
        """None."""
        return {}

    def result(self) -> LanguageModel:
        """The model as it stands, without clusters: they are only worth their time at the end."""
        return self._network.model(self._tokenizer.json)


def pretrain(
    tokens: NDArray[np.signedinteger[Any]],
    tokenizer: Tokenizer,
    architecture: Architecture,
    optimisation: Optimisation,
    seed: int,
    *,
    block: int = BLOCK,
    positions: int = POSITIONS,
    identity: Mapping[str, str] | None = None,
    device: str = "cpu",
) -> TrainingState[LanguageModel]:
    """Training from scratch, for `loop.run`; apply `with_clusters` to the last result.

    tokens: a corpus as `tokenizer` encodes it (N,). block: tokens a sequence, at most `positions`, the rows of the
    position table. Every row is trained, see `TextBlocks.sample`. Raises UserError for too little text.
    """
    if block > positions:
        raise UserError(f"a block of {block} tokens does not fit a table of {positions} positions: shorten the block")
    blocks = TextBlocks(tokens, block)
    network = initialised(
        seed, lambda: LanguageNetwork(architecture, tokenizer.size, positions, optimisation.dropout)
    ).to(device)
    described = {
        "text": hashlib.sha256(tokenizer.json.encode() + np.ascontiguousarray(tokens).tobytes()).hexdigest(),
        "architecture": architecture.model_dump_json(),
        "block": str(block),
        "positions": str(positions),
        **(identity or {}),
    }
    objective = LanguageObjective(network, blocks, optimisation, tokenizer)
    return TrainingState(objective, optimisation, seed, described, device)
