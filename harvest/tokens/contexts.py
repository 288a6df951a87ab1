"""Contexts by shard: what a worker harvests, and what the store keeps about its text.

Shards take the contexts of the windows one after the other. Which they get, and which documents
they list, does not depend on where in the corpus reading began.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from sae_harvest.common.errors import InputError
from sae_harvest.harvest.text.duplicates import Hashes
from sae_harvest.harvest.tokens.encoding import Columns
from sae_harvest.harvest.tokens.windows import WINDOW_CONTEXTS, Bos, Window, iter_contexts
from sae_harvest.store.tables import DOCUMENT_SCHEMA, PIECE_SCHEMA, TEXT_FIELD

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from sae_harvest.harvest.text.documents import Corpus


@dataclass(frozen=True)
class ShardInput:
    """What a worker needs to harvest one shard, and what the store keeps about its text.

    tokens     int32 [contexts, context_length]
    pieces     one row for each part of a document in a context, sorted by (context, start):
                 context                int64, number of the context in the store
                 start, stop            int32, positions in the context, half open; the end-of-text
                                        token belongs to the document before it, a BOS to none
                 document               int64, number among the corpus' documents with text (without
                                        duplicates, where they are left out), from 0
                 document_hash          uint64, xxh3 of the document's UTF-8 text
                 first_token            int64, index in its document of the token at `start`
                 char_start, char_end   int64, characters of the document, half open; empty, at the
                                        document's end, for an end-of-text token alone. A character
                                        whose bytes lie in two pieces is in the span of both.
    documents  one row for each document whose first piece, in the order of the store, is in this
               shard: document, id, source, title, url, text_hash (uint64), n_chars, n_tokens
               (int64, without the end-of-text token), and text if it is kept. Over all shards,
               each document once.
    cursor     of the window that holds the shard's first context: where `iter_shards` can begin
               for this shard and all after it
    """

    shard: int
    tokens: np.ndarray
    pieces: pa.Table
    documents: pa.Table
    cursor: dict[str, Any]


def default_bos(tokenizer: PreTrainedTokenizerBase) -> Bos:
    """`context` where the tokenizer itself puts a BOS token before a text, else `none`."""
    bos = tokenizer.bos_token_id
    return "context" if bos is not None and tokenizer("a")["input_ids"][:1] == [bos] else "none"


def iter_shards(
    corpus: Corpus,
    tokenizer: PreTrainedTokenizerBase,
    context_length: int,
    bos: Bos,
    seed: int,
    *,
    contexts_per_shard: int,
    n_shards: int,
    at_least: int,
    window_contexts: int = WINDOW_CONTEXTS,
    first_shard: int = 0,
    cursor: dict[str, Any] | None = None,
    seen: Iterable[Hashes] = (),
    keep_text: bool = False,
) -> Iterator[ShardInput]:
    """Shards `first_shard` to `n_shards - 1`; where the corpus ends, a short one is the last.

    Args:
        at_least: contexts that the corpus must hold, those of earlier shards included.
        cursor: of any shard up to `first_shard`; the nearer, the less is read in vain. The shards
            are the same as without one.
        seen: see `iter_contexts`; the text hashes of all documents below `cursor["document"]`,
            which the shards before `first_shard` have listed.
        keep_text: the documents come with their text.

    Raises:
        InputError: the corpus holds fewer contexts than `at_least`. Said before the last window is
            handed out, unless that is a full one.
    """
    last = n_shards * contexts_per_shard  # of the contexts wanted, and the first of them, below
    first = first_shard * contexts_per_shard
    n_seen = cursor["window"] * window_contexts if cursor else 0
    if n_seen > first:
        raise ValueError(f"The cursor is of context {n_seen}, after shard {first_shard} begins.")
    windows = iter_contexts(
        corpus,
        tokenizer,
        context_length,
        bos,
        seed,
        window_contexts,
        cursor=cursor,
        seen=seen,
        keep_text=keep_text,
    )
    schema = DOCUMENT_SCHEMA.append(TEXT_FIELD) if keep_text else DOCUMENT_SCHEMA
    held = _Held(first_shard, schema)
    for window in windows:
        begin, end = n_seen, min(last, n_seen + len(window.tokens))
        n_seen += len(window.tokens)
        if len(window.tokens) < window_contexts and n_seen < at_least:
            break
        listed = np.zeros(len(window.documents["document"]), dtype=bool)
        if begin < first:
            _part(window, begin, min(first, end), listed)
        at = max(begin, first)
        while at < end:
            stop = min(end, (held.shard + 1) * contexts_per_shard)
            held.add(_part(window, at, stop, listed), window.cursor)
            at = stop
            if at == (held.shard + 1) * contexts_per_shard:
                yield held.handed_out()
        if n_seen >= last:
            return
        del window  # before the next one is made
    if n_seen >= at_least:
        if held.parts:
            yield held.handed_out()
        return
    have, wanted = n_seen * context_length, at_least * context_length
    if not have:
        raise InputError(
            f"The corpus {corpus.name} holds 0 tokens in whole contexts of {context_length}, not "
            "even one; use a shorter --context-length or a larger corpus."
        )
    raise InputError(
        f"The corpus {corpus.name} holds {have:,} tokens in whole contexts of {context_length}, "
        f"fewer than the {wanted:,} asked for; ask for --tokens {have} or a larger corpus, or take "
        "what there is with --tokens all."
    )


@dataclass(frozen=True)
class _Part:
    """Consecutive contexts of one window on their way into a shard."""

    tokens: np.ndarray
    pieces: Columns
    documents: Columns


class _Held:
    """The parts of a shard that is not whole yet."""

    def __init__(self, shard: int, document_schema: pa.Schema) -> None:
        self.shard = shard
        self.parts: list[_Part] = []
        self._cursor: dict[str, Any] = {}
        self._document_schema = document_schema

    def add(self, part: _Part, cursor: dict[str, Any]) -> None:
        if not self.parts:
            self._cursor = cursor
        self.parts.append(part)

    def handed_out(self) -> ShardInput:
        """The shard; what is added from now on belongs to the next one."""
        parts, self.parts = self.parts, []
        self.shard += 1
        return ShardInput(
            shard=self.shard - 1,
            tokens=np.concatenate([part.tokens for part in parts]),
            pieces=_table([part.pieces for part in parts], PIECE_SCHEMA),
            documents=_table([part.documents for part in parts], self._document_schema),
            cursor=self._cursor,
        )


def _part(window: Window, first: int, last: int, listed: np.ndarray) -> _Part:
    """Contexts [first, last) of the store, all of one window.

    `listed` [documents], which of the window's were listed, is brought up to date. A document that
    began in an earlier window was listed there, as all of a window comes before the next one.
    """
    contexts = window.pieces["context"]
    start, stop = np.searchsorted(contexts, [first, last])
    pieces = {name: column[start:stop] for name, column in window.pieces.items()}
    numbers = window.documents["document"]
    here = np.zeros_like(listed)
    if len(numbers):
        begun = pieces["document"] - numbers[0]
        here[begun[begun >= 0]] = True
    fresh = here & ~listed
    listed |= here
    documents = {name: column[fresh] for name, column in window.documents.items()}
    at = window.first_context
    return _Part(window.tokens[first - at : last - at], pieces, documents)


def _table(parts: list[Columns], schema: pa.Schema) -> pa.Table:
    columns = {field.name: [part[field.name] for part in parts] for field in schema}
    return pa.table({name: np.concatenate(column) for name, column in columns.items()}, schema)
