"""Byte-level byte-pair encoding, as GPT-2's: any text comes back exactly, and no token is unknown."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import tokenizers
from numpy.typing import NDArray
from tokenizers import decoders, models, pre_tokenizers, trainers

from dt.errors import UserError

END_OF_TEXT = "<|endoftext|>"
SMALLEST = 257  # all bytes and the end of a text


class Tokenizer:
    """A vocabulary and its merges. All of it is in `json`, the Tokenizers library's own format."""

    def __init__(self, json: str) -> None:
        """Raises UserError when that is no byte-level tokenizer with GPT-2's end-of-text token."""
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(json)
        except Exception as error:  # the library raises nothing narrower
            raise UserError(f"not a tokenizer ({error}): give one in the format of tokenizer.json") from error
        end = self._tokenizer.token_to_id(END_OF_TEXT)
        if end is None:
            raise UserError(f"the tokenizer has no {END_OF_TEXT} token: give GPT-2's or one trained here")
        self._tokenizer.encode_special_tokens = True  # a text that spells out the token's name stays text
        self.json, self.end_of_text, self.size = json, int(end), int(self._tokenizer.get_vocab_size())

    @classmethod
    def trained(cls, documents: Sequence[str], vocabulary: int) -> Tokenizer:
        """At most that many tokens; fewer where the text has no pair left to merge. The same from the same text."""
        if vocabulary < SMALLEST:
            raise UserError(f"a vocabulary of {vocabulary} tokens is too small: all bytes alone are {SMALLEST - 1}")
        tokenizer = tokenizers.Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocabulary,
            special_tokens=[END_OF_TEXT],
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        )
        tokenizer.train_from_iterator(documents, trainer)
        return cls(tokenizer.to_str())

    def encode(self, documents: Sequence[str]) -> NDArray[np.int32]:
        """All documents in one array (N,), an end-of-text token between two of them."""
        end = np.array([self.end_of_text], dtype=np.int32)
        parts: list[NDArray[np.int32]] = []
        for some in _batched(documents, 256):
            for encoding in self._tokenizer.encode_batch_fast(some, add_special_tokens=False):
                parts += [np.array(encoding.ids, dtype=np.int32), end]
        return np.concatenate(parts[:-1]) if parts else end[:0]

    def decode(self, tokens: NDArray[np.int32]) -> str:
        """The text of tokens (N,), ends of texts spelt out."""
        return str(self._tokenizer.decode(tokens.tolist(), skip_special_tokens=False))


def _batched(documents: Sequence[str], size: int) -> list[Sequence[str]]:
    return [documents[start : start + size] for start in range(0, len(documents), size)]
