"""Token ids as readable text, token by token."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

INCOMPLETE = "\ufffd"  # what decoding half a character gives


class TokenTexts:
    """Texts of tokens such that those of a window, joined, are the window's text.

    A character that byte-level BPE has split over several tokens stands at the last of them.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    @cached_property
    def table(self) -> list[str]:
        """Text of every token id alone."""
        ids = [[i] for i in range(len(self._tokenizer))]
        return self._tokenizer.batch_decode(ids, clean_up_tokenization_spaces=False)

    def one(self, token: int) -> str:
        return self.table[token]

    def window(self, ids: npt.NDArray[np.int32]) -> list[str]:
        """One text per token id [window]."""
        texts = [self.table[i] for i in ids.tolist()]
        start = None
        for at, text in enumerate([*texts, ""]):
            if INCOMPLETE in text:
                start = at if start is None else start
                joined = self._decode(ids[start : at + 1])
                if INCOMPLETE not in joined:
                    texts[start : at + 1] = [""] * (at - start) + [joined]
                    start = None
            else:
                start = None
        return texts

    def _decode(self, ids: npt.NDArray[np.int32]) -> str:
        return self._tokenizer.decode(ids.tolist(), clean_up_tokenization_spaces=False)
