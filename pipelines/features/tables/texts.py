"""Token ids as readable text, token by token."""

from __future__ import annotations

from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

INCOMPLETE = "\ufffd"  # the result of decoding half a character
ANCHOR = "a"  # decoded before the tokens, because some decoders drop the first token's space


class TokenTexts:
    """Texts of tokens; the joined texts of a window are the window's text.

    If byte-level BPE has split a character over several tokens, the last of them has the character.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._anchor = tokenizer.encode(ANCHOR, add_special_tokens=False)
        self._skipped = len(self._decode_all([self._anchor])[0])

    def __len__(self) -> int:
        """Return the number of the tokenizer's ids; a model may have more, for padding."""
        return max(self._tokenizer.get_vocab().values()) + 1

    @cached_property
    def table(self) -> list[str]:
        """Return the text of every token id by itself."""
        texts = self._decode_all([[*self._anchor, i] for i in range(len(self))])
        return [text[self._skipped :] for text in texts]

    def one(self, token: int) -> str:
        """Return the text of one token id."""
        return self.table[token]

    def of(self, ids: npt.NDArray[np.integer]) -> pa.Array:
        """Return texts of token ids [some], each by itself."""
        return self._columns[0].take(pa.array(ids))

    def window(self, ids: npt.NDArray[np.int32]) -> list[str]:
        """Return one text per token id [window]."""
        if not len(ids):
            return []
        texts, ends = self.windows(ids[None])
        return pieces(texts[0].as_py(), ends[0].tolist())

    def windows(self, ids: npt.NDArray[np.int32]) -> tuple[pa.Array, npt.NDArray[np.int32]]:
        """Return texts of windows of token ids [some, window].

        Returns:
            the texts [some]; where in its window each token's text ends, in characters, int32
            [some, window].
        """
        texts, lengths, incomplete = self._columns
        parts = incomplete[ids]  # parts of characters; a single one does not change
        split = np.flatnonzero((parts[:, 1:] & parts[:, :-1]).any(axis=1))
        if len(split):
            new, mended = self._mended(ids[split], parts[split])
            ids = ids.copy()
            ids[split] = new
            texts = pa.concat_arrays([texts, pa.array(mended, pa.string())])
            lengths = np.append(lengths, _lengths(mended))
        return _joined(texts.take(pa.array(ids.reshape(-1))), ids.shape[1]), lengths[ids].cumsum(
            axis=1, dtype=np.int32
        )

    @cached_property
    def _columns(self) -> tuple[pa.Array, npt.NDArray[np.int32], npt.NDArray[np.bool_]]:
        """Return texts of all ids, their lengths, and a mask of incomplete ones."""
        incomplete = np.array([INCOMPLETE in text for text in self.table])
        return pa.array(self.table, pa.string()), _lengths(self.table), incomplete

    def _mended(
        self, ids: npt.NDArray[np.int32], parts: npt.NDArray[np.bool_]
    ) -> tuple[npt.NDArray[np.int32], list[str]]:
        """Give runs of incomplete tokens new ids; return all ids, and texts of the new ones."""
        some, window = ids.shape
        edges = np.zeros((some, window + 1), np.int8)
        edges[:, :-1] = parts
        changes = np.flatnonzero(np.diff(edges.reshape(-1), prepend=0))
        starts, stops = changes[::2], changes[1::2]  # in rows of window + 1
        several = stops - starts > 1
        flat, mended, new = ids.reshape(-1).copy(), list[str](), dict[tuple[int, ...], int]()
        for start, stop in zip(starts[several].tolist(), stops[several].tolist(), strict=True):
            first = start - start // (window + 1)
            here = slice(first, first + stop - start)
            run = tuple(flat[here].tolist())
            if run not in new:
                new[run] = len(self.table) + len(mended)
                mended += self._run(run)
            flat[here] = np.arange(new[run], new[run] + len(run))
        return flat.reshape(ids.shape), mended

    def _run(self, ids: tuple[int, ...]) -> list[str]:
        """Return texts of incomplete tokens: each has the characters that it completes."""
        prefixes = [[*self._anchor, *ids[: n + 1]] for n in range(len(ids))]
        texts, said = [], ""
        for n, decoded in enumerate(self._decode_all(prefixes), start=1):
            whole = decoded[self._skipped :]
            if n < len(ids):  # an incomplete end may become complete
                whole = whole.rstrip(INCOMPLETE)
            texts.append(whole[len(said) :])
            said = max(said, whole, key=len)
        return texts

    def _decode_all(self, ids: list[list[int]]) -> list[str]:
        return self._tokenizer.batch_decode(ids, clean_up_tokenization_spaces=False)


def pieces(text: str, ends: list[int]) -> list[str]:
    """Cut a window's text at the ends of its tokens' texts."""
    return [text[start:end] for start, end in pairwise([0, *ends])]


def _joined(flat: pa.Array, width: int) -> pa.Array:
    """Join every `width` texts without a copy, since they follow one another in memory."""
    _, offsets, content = flat.buffers()
    ends = np.frombuffer(offsets, np.int32)[flat.offset : flat.offset + len(flat) + 1 : width]
    return pa.StringArray.from_buffers(len(flat) // width, pa.py_buffer(ends.copy()), content)


def _lengths(texts: list[str]) -> npt.NDArray[np.int32]:
    return np.array([len(text) for text in texts], np.int32)
