"""Documents to tokens: a batch of documents becomes one run of the token stream, and its pieces.

A piece is the part of a document that lies in one context. Its characters come from the offsets
that the tokenizer keeps; they are asked for at the borders of pieces only, as asking for every
token costs more than a tenth of tokenizing.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import xxhash

from store.errors import InputError

if TYPE_CHECKING:
    from tokenizers import Encoding
    from transformers import PreTrainedTokenizerBase

    from harvest.corpus import Document

Columns = dict[str, np.ndarray]

PIECE_SCHEMA = pa.schema(
    {
        "context": pa.int64(),
        "start": pa.int32(),
        "stop": pa.int32(),
        "document": pa.int64(),
        "document_hash": pa.uint64(),
        "first_token": pa.int64(),
        "char_start": pa.int64(),
        "char_end": pa.int64(),
    }
)
DOCUMENT_SCHEMA = pa.schema(
    {
        "document": pa.int64(),
        "id": pa.string(),
        "source": pa.string(),
        "title": pa.string(),
        "url": pa.string(),
        "text_hash": pa.uint64(),
        "n_chars": pa.int64(),
        "n_tokens": pa.int64(),
    }
)

BATCH_DOCUMENTS = 64
BATCH_CHARS = 4_000_000

# The marks between documents of pretraining. The EOS token of a chat model ends a turn instead.
_END_OF_TEXT = ("<|endoftext|>", "<|end_of_text|>")


@dataclass(frozen=True)
class Batch:
    """Some documents, one after the other, each closed by the end-of-text token.

    tokens     int32 [tokens]
    pieces     PIECE_SCHEMA, in the order of the stream; contexts and positions without BOS
    documents  DOCUMENT_SCHEMA, in the order of the corpus
    """

    tokens: np.ndarray
    pieces: Columns
    documents: Columns


def end_of_text_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token put after each document: the one of pretraining if it has one, else its EOS.

    Raises InputError for a tokenizer that has neither.
    """
    special = {str(token): i for i, token in tokenizer.added_tokens_decoder.items()}
    for text in _END_OF_TEXT:
        if text in special:
            return special[text]
    if tokenizer.eos_token_id is None:
        raise InputError(
            "The tokenizer has no end-of-text token to put between documents; expected an EOS "
            "token; use a model whose tokenizer has one."
        )
    return tokenizer.eos_token_id


class DocumentEncoder:
    """A private copy of a tokenizer, set to read text as text.

    Control tokens spelled out in a text are cut up like any other characters, nothing is
    truncated, padded or put around it, and offsets keep their leading spaces. (Vocabularies of
    unigrams that list their control tokens, as XGLM's does, match them in text all the same.)
    Raises InputError for a tokenizer that keeps no offsets.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        from tokenizers import Tokenizer

        if not tokenizer.is_fast:
            raise InputError(
                f"The tokenizer {type(tokenizer).__name__} keeps no character offsets; use a "
                "model that comes with a tokenizer.json."
            )
        self._end_of_text = end_of_text_id(tokenizer)
        self._tokenizer = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
        self._tokenizer.encode_special_tokens = True
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.post_processor = None  # it may trim the spaces from the offsets

    def batches(self, documents: Iterable[Document], text_length: int) -> Iterator[Batch]:
        """The stream, cut to contexts of `text_length` tokens, a batch of documents at a time."""
        n_documents, n_tokens = 0, 0
        for group in _grouped(documents):
            batch = self._encode(group, n_documents, n_tokens, text_length)
            n_documents += len(group)
            n_tokens += len(batch.tokens)
            yield batch

    def _encode(
        self, group: list[Document], first_document: int, first_token: int, text_length: int
    ) -> Batch:
        encodings = self._tokenizer.encode_batch(
            [document.text for document in group], add_special_tokens=False
        )
        end = np.array([self._end_of_text], dtype=np.int32)
        runs: list[np.ndarray] = []
        for encoding in encodings:
            runs += [np.array(encoding.ids, dtype=np.int32), end]
        lengths = np.array([len(encoding) for encoding in encodings], dtype=np.int64)
        columns: Columns = {
            "document": first_document + np.arange(len(group)),
            "text_hash": np.array(
                [xxhash.xxh3_64_intdigest(document.text.encode()) for document in group],
                dtype=np.uint64,
            ),
            "n_chars": np.array([len(document.text) for document in group], dtype=np.int64),
            "n_tokens": lengths,
        }
        for name in ("id", "source", "title", "url"):
            columns[name] = np.array(
                [getattr(document, name) for document in group], dtype=np.object_
            )
        stops = first_token + np.cumsum(lengths + 1)
        which, pieces = _cut(stops - lengths - 1, stops, text_length)
        pieces["document"] = columns["document"][which]
        pieces["document_hash"] = columns["text_hash"][which]
        pieces |= _characters(encodings, columns, which, pieces)
        return Batch(np.concatenate(runs), pieces, columns)


def _grouped(documents: Iterable[Document]) -> Iterator[list[Document]]:
    """Up to 64 documents at a time, fewer where they are long."""
    group: list[Document] = []
    n_chars = 0
    for document in documents:
        group.append(document)
        n_chars += len(document.text)
        if len(group) == BATCH_DOCUMENTS or n_chars >= BATCH_CHARS:
            yield group
            group, n_chars = [], 0
    if group:
        yield group


def _cut(starts: np.ndarray, stops: np.ndarray, text_length: int) -> tuple[np.ndarray, Columns]:
    """Runs [starts, stops) of the stream, int64 [runs], cut at multiples of `text_length`.

    Returns which run each piece belongs to, int64 [pieces], and the pieces' places.
    """
    first = starts // text_length
    counts = (stops - 1) // text_length - first + 1
    which = np.repeat(np.arange(len(starts)), counts)
    context = np.arange(len(which)) - np.repeat(np.cumsum(counts) - counts, counts) + first[which]
    begin = np.maximum(starts[which], context * text_length)
    end = np.minimum(stops[which], (context + 1) * text_length)
    return which, {
        "context": context,
        "start": (begin - context * text_length).astype(np.int32),
        "stop": (end - context * text_length).astype(np.int32),
        "first_token": begin - starts[which],
    }


def _characters(
    encodings: list[Encoding], documents: Columns, which: np.ndarray, pieces: Columns
) -> Columns:
    """The characters of each piece, int64 [pieces] twice: from its first token's to its last's."""
    n_tokens, n_chars = documents["n_tokens"][which], documents["n_chars"][which]
    first = pieces["first_token"]
    last = np.minimum(first + pieces["stop"] - pieces["start"], n_tokens) - 1
    char_start, char_end = n_chars.copy(), n_chars.copy()
    has_text = np.flatnonzero(last >= first)
    columns = (has_text, which[has_text], first[has_text], last[has_text])
    for piece, run, begin, end in zip(*(column.tolist() for column in columns), strict=True):
        char_start[piece] = encodings[run].token_to_chars(begin)[0]
        char_end[piece] = encodings[run].token_to_chars(end)[1]
    return {"char_start": char_start, "char_end": char_end}
