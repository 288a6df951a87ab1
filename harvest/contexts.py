"""Documents to contexts: tokenized, joined, cut to one length, shuffled, and handed out by shard.

The documents of a corpus, each followed by the end-of-text token, make one stream of tokens. The
stream is cut to contexts, a fixed number of contexts makes a window, and each window is shuffled by
itself. What comes out is a pure function of (corpus, tokenizer, context length, BOS policy, seed,
window): asking for more tokens later continues the same order.

Nothing here loops over tokens in Python; memory holds one window and one batch of documents.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
import pyarrow as pa

from harvest.encoding import DOCUMENT_SCHEMA, PIECE_SCHEMA, Columns, DocumentEncoder
from store.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from harvest.corpus import Corpus

Bos = Literal["none", "context"]

WINDOW_CONTEXTS = 32_768


@dataclass(frozen=True)
class Window:
    """A run of consecutive contexts, in shuffled order.

    first_context  number of the first one, counted from the start of the corpus
    tokens         int32 [contexts, context_length]
    pieces         columns as in `ShardInput.pieces`, sorted by (context, start)
    documents      columns as in `ShardInput.documents`: the documents that begin in this window,
                   whose numbers are consecutive
    """

    first_context: int
    tokens: np.ndarray
    pieces: Columns
    documents: Columns


@dataclass(frozen=True)
class ShardInput:
    """What a worker needs to harvest one shard, and what the store keeps about its text.

    tokens     int32 [contexts, context_length]
    pieces     one row for each part of a document in a context, sorted by (context, start):
                 context                int64, number of the context in the store
                 start, stop            int32, positions in the context, half open; the end-of-text
                                        token belongs to the document before it, a BOS to none
                 document               int64, number among the corpus' documents with text, from 0
                 document_hash          uint64, xxh3 of the document's UTF-8 text
                 first_token            int64, index in its document of the token at `start`
                 char_start, char_end   int64, characters of the document, half open; empty, at the
                                        document's end, for an end-of-text token alone. A character
                                        whose bytes lie in two pieces is in the span of both.
    documents  one row for each document whose first piece, in the order of the store, is in this
               shard: document, id, source, title, url, text_hash (uint64), n_chars, n_tokens
               (int64, without the end-of-text token). Over all shards, each document once.
    """

    shard: int
    tokens: np.ndarray
    pieces: pa.Table
    documents: pa.Table


def default_bos(tokenizer: PreTrainedTokenizerBase) -> Bos:
    """`context` where the tokenizer itself puts a BOS token before a text, else `none`."""
    bos = tokenizer.bos_token_id
    return "context" if bos is not None and tokenizer("a")["input_ids"][:1] == [bos] else "none"


def iter_contexts(
    corpus: Corpus,
    tokenizer: PreTrainedTokenizerBase,
    context_length: int,
    bos: Bos,
    seed: int,
    window_contexts: int = WINDOW_CONTEXTS,
) -> Iterator[Window]:
    """Every whole context of the corpus, window after window; tokens left over at the end go.

    With `bos` "context", position 0 of each context is the BOS token and `context_length - 1`
    tokens of text follow. `seed` is 0 or more. Raises InputError for a tokenizer without the
    tokens needed, and for what is wrong with the corpus.
    """
    n_bos = int(bos == "context")
    if n_bos and tokenizer.bos_token_id is None:
        raise InputError(
            "The tokenizer has no BOS token, so no context can begin with one; use --bos none."
        )
    if context_length <= n_bos:
        raise InputError(
            f"The context length is {context_length}, expected at least {n_bos + 1}; "
            "raise --context-length."
        )
    text_length = context_length - n_bos
    for index, stream in enumerate(_windows(corpus, tokenizer, text_length, window_contexts)):
        order = _permutation(len(stream.tokens), seed, index)
        tokens = np.empty((len(order), context_length), dtype=np.int32)
        tokens[:, :n_bos] = tokenizer.bos_token_id if n_bos else 0
        np.take(stream.tokens, order, axis=0, out=tokens[:, n_bos:], mode="clip")
        yield Window(
            first_context=stream.first_context,
            tokens=tokens,
            pieces=_reordered(stream, order, n_bos),
            documents=stream.documents,
        )


def iter_shards(
    corpus: Corpus,
    tokenizer: PreTrainedTokenizerBase,
    context_length: int,
    bos: Bos,
    seed: int,
    *,
    contexts_per_shard: int,
    n_contexts: int,
    window_contexts: int = WINDOW_CONTEXTS,
) -> Iterator[ShardInput]:
    """The first `n_contexts` contexts by shard; the last shard may be smaller.

    Raises InputError, before the corpus' last window is handed out, when it holds fewer.
    """
    shard, parts, n_held = 0, list[_Part](), 0
    n_seen = 0
    windows = iter_contexts(corpus, tokenizer, context_length, bos, seed, window_contexts)
    for window in windows:
        n_window = len(window.tokens)
        n_seen += n_window
        if n_window < window_contexts and n_seen < n_contexts:
            break
        listed = np.zeros(len(window.documents["document"]), dtype=bool)
        at = 0
        while at < n_window and shard * contexts_per_shard < n_contexts:
            size = min(contexts_per_shard, n_contexts - shard * contexts_per_shard)
            taken = min(size - n_held, n_window - at)
            parts.append(_part(window, at, at + taken, listed))
            at += taken
            n_held += taken
            if n_held == size:
                yield _shard_input(shard, parts)
                shard, parts, n_held = shard + 1, [], 0
        if n_seen >= n_contexts:
            return
    have, wanted = n_seen * context_length, n_contexts * context_length
    remedy = f"ask for --tokens {have} or" if have else "use a shorter --context-length or"
    raise InputError(
        f"The corpus {corpus.name} holds {have:,} tokens in whole contexts of {context_length}, "
        f"fewer than the {wanted:,} asked for; {remedy} a larger corpus."
    )


@dataclass(frozen=True)
class _Part:
    """Consecutive contexts of one window on their way into a shard."""

    tokens: np.ndarray
    pieces: Columns
    documents: Columns


def _part(window: Window, first: int, last: int, listed: np.ndarray) -> _Part:
    """Contexts [first, last) of a window; `listed` [documents] is brought up to date.

    A document that began in an earlier window was listed there, as all of a window comes before
    the next one.
    """
    contexts = window.pieces["context"]
    start, stop = np.searchsorted(contexts, window.first_context + np.array([first, last]))
    pieces = {name: column[start:stop] for name, column in window.pieces.items()}
    numbers = window.documents["document"]
    here = np.zeros_like(listed)
    if len(numbers):
        begun = pieces["document"] - numbers[0]
        here[begun[begun >= 0]] = True
    fresh = here & ~listed
    listed |= here
    documents = {name: column[fresh] for name, column in window.documents.items()}
    return _Part(window.tokens[first:last], pieces, documents)


def _shard_input(shard: int, parts: list[_Part]) -> ShardInput:
    return ShardInput(
        shard=shard,
        tokens=np.concatenate([part.tokens for part in parts]),
        pieces=_table([part.pieces for part in parts], PIECE_SCHEMA),
        documents=_table([part.documents for part in parts], DOCUMENT_SCHEMA),
    )


def _table(parts: list[Columns], schema: pa.Schema) -> pa.Table:
    columns = {field.name: [part[field.name] for part in parts] for field in schema}
    return pa.table({name: np.concatenate(column) for name, column in columns.items()}, schema)


def _windows(
    corpus: Corpus, tokenizer: PreTrainedTokenizerBase, text_length: int, window_contexts: int
) -> Iterator[Window]:
    """The stream cut to contexts, in the order of the corpus; tokens [contexts, text_length]."""
    window_tokens = window_contexts * text_length
    tokens, pieces, documents = list[np.ndarray](), list[Columns](), list[Columns]()
    n_pending, first_context = 0, 0

    def cut(n_contexts: int) -> Window:
        """Takes the first contexts off what is pending."""
        nonlocal tokens, pieces, documents, n_pending, first_context
        flat = np.concatenate(tokens)
        end = n_contexts * text_length
        limit = first_context + n_contexts
        taken_pieces, left_pieces = _split(_joined(pieces), "context", limit)
        begun = taken_pieces["document"][-1] + 1
        taken_documents, left_documents = _split(_joined(documents), "document", begun)
        window = Window(
            first_context=first_context,
            tokens=flat[:end].reshape(n_contexts, text_length),
            pieces=taken_pieces,
            documents=taken_documents,
        )
        tokens, pieces, documents = [flat[end:]], [left_pieces], [left_documents]
        n_pending, first_context = n_pending - end, limit
        return window

    for batch in DocumentEncoder(tokenizer).batches(corpus.documents(), text_length):
        tokens.append(batch.tokens)
        pieces.append(batch.pieces)
        documents.append(batch.documents)
        n_pending += len(batch.tokens)
        while n_pending >= window_tokens:
            yield cut(window_contexts)
    if n_pending >= text_length:
        yield cut(n_pending // text_length)


def _joined(parts: list[Columns]) -> Columns:
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _split(columns: Columns, key: str, limit: int) -> tuple[Columns, Columns]:
    """Rows whose ascending `key` is below `limit`, and the rest."""
    at = int(np.searchsorted(columns[key], limit))
    first = {name: column[:at] for name, column in columns.items()}
    return first, {name: column[at:] for name, column in columns.items()}


def _permutation(size: int, seed: int, index: int) -> np.ndarray:
    """The order of window `index`, int64 [size].

    Made from raw draws, whose values NumPy promises to keep; those of `permutation` it does not.
    """
    draws = np.random.PCG64(np.random.SeedSequence([seed, index])).random_raw(size)
    return np.argsort(draws, kind="stable")


def _reordered(window: Window, order: np.ndarray, n_bos: int) -> Columns:
    """The pieces of a window after its contexts were put in `order`, and `n_bos` put before each.

    A context's pieces keep their order.
    """
    rank = np.empty(len(order), dtype=np.int64)
    rank[order] = np.arange(len(order))
    context = window.first_context + rank[window.pieces["context"] - window.first_context]
    by_context = np.argsort(context, kind="stable")
    pieces = {name: column[by_context] for name, column in window.pieces.items()}
    pieces["context"] = context[by_context]
    pieces["start"] = pieces["start"] + np.int32(n_bos)
    pieces["stop"] = pieces["stop"] + np.int32(n_bos)
    return pieces
