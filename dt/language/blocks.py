"""Training batches of text: random blocks of an encoded corpus."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dt.errors import UserError

BLOCK = 256  # tokens


class TextBatch(NamedTuple):
    """B blocks of T tokens."""

    tokens: Tensor  # (B, T) int64
    following: Tensor  # (B, T) int64, the token after each of them
    positions: Tensor  # (B, T) int64, rows of the position table


@dataclass(frozen=True, eq=False)
class TextBlocks:
    """An encoded corpus (N,) to draw blocks of `block` tokens from. Raises UserError when it has no block."""

    tokens: NDArray[np.signedinteger[Any]]
    block: int

    def __post_init__(self) -> None:
        if len(self.tokens) <= self.block:
            raise UserError(
                f"the text has {len(self.tokens)} tokens, a block needs {self.block + 1}: "
                "take more text or a shorter block"
            )

    def sample(self, sequences: int, rows: int, rng: np.random.Generator) -> TextBatch:
        """Uniformly drawn blocks, each at a uniformly drawn place in a position table of that many rows.

        So every row is trained although a block is shorter than the table, which later holds the time steps; GPT-2's
        and the original's blocks are as long as the table and begin at row 0, as they do here for block = rows.
        Raises UserError when a block is longer than the table.
        """
        if self.block > rows:
            raise UserError(
                f"a block of {self.block} tokens does not fit a table of {rows} positions: shorten the block"
            )
        starts = rng.integers(len(self.tokens) - self.block, size=(sequences, 1))
        chunks = torch.from_numpy(self.tokens[starts + np.arange(self.block + 1)].astype(np.int64))
        positions = rng.integers(rows - self.block + 1, size=(sequences, 1)) + np.arange(self.block)
        return TextBatch(chunks[:, :-1], chunks[:, 1:], torch.from_numpy(positions))
