"""Token ids as readable text, token by token."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

INCOMPLETE = "\ufffd"  # what decoding half a character gives
ANCHOR = "a"  # tokens are decoded after this one: some decoders drop the first one's space


class TokenTexts:
    """Texts of tokens such that those of a window, joined, are the window's text.

    A character that byte-level BPE has split over several tokens stands at the last of them.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._anchor = tokenizer.encode(ANCHOR, add_special_tokens=False)
        self._skipped = len(self._decode_all([self._anchor])[0])

    def __len__(self) -> int:
        """Token ids the tokenizer knows are below this; a model may have padded its rows."""
        return max(self._tokenizer.get_vocab().values()) + 1

    @cached_property
    def table(self) -> list[str]:
        """Text of every token id alone."""
        texts = self._decode_all([[*self._anchor, i] for i in range(len(self))])
        return [text[self._skipped :] for text in texts]

    def one(self, token: int) -> str:
        """Text of one token id."""
        return self.table[token]

    def of(self, ids: npt.NDArray[np.integer]) -> pa.Array:
        """Texts of token ids [some], each alone."""
        return self._columns[0].take(pa.array(ids))

    def windows(self, ids: npt.NDArray[np.int32]) -> pa.Array:
        """One text per token id of windows [some, window], flat."""
        texts, incomplete = self._columns
        parts = incomplete[ids]  # of characters; one alone stays as it is
        split = np.flatnonzero((parts[:, 1:] & parts[:, :-1]).any(axis=1))
        if len(split):
            mended = [text for line in ids[split] for text in self.window(line)]
            ids = ids.copy()
            ids[split] = len(texts) + np.arange(len(mended)).reshape(len(split), -1)
            texts = pa.concat_arrays([texts, pa.array(mended, pa.string())])
        return texts.take(pa.array(ids.reshape(-1)))

    @cached_property
    def _columns(self) -> tuple[pa.Array, npt.NDArray[np.bool_]]:
        """Texts of all ids, and which of them are incomplete."""
        incomplete = np.array([INCOMPLETE in text for text in self.table])
        return pa.array(self.table, pa.string()), incomplete

    def window(self, ids: npt.NDArray[np.int32]) -> list[str]:
        """One text per token id [window]."""
        texts = [self.table[i] for i in ids.tolist()]
        start = 0
        while start < len(texts):
            stop = start
            while stop < len(texts) and INCOMPLETE in texts[stop]:
                stop += 1
            if stop > start + 1:
                texts[start:stop] = self._run(ids[start:stop])
            start = stop + 1
        return texts

    def _run(self, ids: npt.NDArray[np.int32]) -> list[str]:
        """Texts of tokens that are all incomplete alone: each says what it completes."""
        prefixes = [[*self._anchor, *ids[: n + 1].tolist()] for n in range(len(ids))]
        texts, said = [], ""
        for n, decoded in enumerate(self._decode_all(prefixes), start=1):
            whole = decoded[self._skipped :]
            if n < len(ids):  # what is incomplete at the end may become whole
                whole = whole.rstrip(INCOMPLETE)
            texts.append(whole[len(said) :])
            said = max(said, whole, key=len)
        return texts

    def _decode_all(self, ids: list[list[int]]) -> list[str]:
        return self._tokenizer.batch_decode(ids, clean_up_tokenization_spaces=False)
