"""The contexts of each shard, and the tables about its text that the store keeps.

Shards take the contexts of the windows one after the other. The contexts of a shard, and the
documents that it lists, do not depend on where in the corpus reading began.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from sae_harvest.common.errors import InputError
from sae_harvest.harvest.text.duplicates import Hashes
from sae_harvest.harvest.tokens.encoding import StreamCursor, TokenizedText, joined
from sae_harvest.harvest.tokens.windows import WINDOW_CONTEXTS, Bos, iter_windows
from sae_harvest.store.tables import DOCUMENT_SCHEMA, PIECE_SCHEMA, TEXT_FIELD
from sae_harvest.store.writer import Shard

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from sae_harvest.harvest.text.documents import Corpus


def default_bos(tokenizer: PreTrainedTokenizerBase) -> Bos:
    """Return `context` if the tokenizer itself puts a BOS token before a text, else `none`."""
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
    seen_hashes: Iterable[Hashes] = (),
    keep_text: bool = False,
) -> Iterator[Shard]:
    """Yield shards `first_shard` to `n_shards - 1`, without activations.

    If the corpus ends earlier, a shorter shard is the last.

    Args:
        at_least: contexts that the corpus must hold, including those of earlier shards.
        cursor: cursor of any shard up to `first_shard`; a near one saves reading. The shards are
            the same as without a cursor.
        seen_hashes: see `iter_windows`; the hashes of all documents below `cursor["document"]`,
            which the shards before `first_shard` have listed.
        keep_text: whether the documents come with their text.

        Raises:
        InputError: the corpus holds fewer contexts than `at_least`. Raised before the last window
            is yielded, unless that window is full.
    """
    first, last = first_shard * contexts_per_shard, n_shards * contexts_per_shard
    n_seen, place = 0, StreamCursor()
    if cursor:
        n_seen = cursor["window"] * window_contexts
        place = StreamCursor(cursor["corpus"], cursor["document"], cursor["token"])
    if n_seen > first:
        raise ValueError(f"The cursor is of context {n_seen}, after shard {first_shard} begins.")
    windows = iter_windows(
        corpus,
        tokenizer,
        context_length,
        bos,
        seed,
        window_contexts,
        first_window=n_seen // window_contexts,
        cursor=place,
        seen_hashes=seen_hashes,
        keep_text=keep_text,
    )
    number = first_shard
    parts: list[TokenizedText] = []  # of this shard
    for window in windows:
        begin, n_seen = n_seen, n_seen + len(window.tokens)
        if len(window.tokens) < window_contexts and n_seen < at_least:
            break
        listed_in = _first_contexts(window)
        context, end = max(begin, first), min(last, n_seen)
        while context < end:
            next_shard = (number + 1) * contexts_per_shard
            stop = min(end, next_shard)
            parts.append(_part(window, context, stop, listed_in))
            if stop == next_shard:
                shard = _shard(number, parts, number * contexts_per_shard // window_contexts)
                number, parts = number + 1, []
                yield shard
            context = stop
        if n_seen >= last:
            return
        del window  # free the memory before the next window is made
    if n_seen >= at_least:
        if parts:
            yield _shard(number, parts, number * contexts_per_shard // window_contexts)
        return
    n_tokens, min_tokens = n_seen * context_length, at_least * context_length
    if not n_tokens:
        raise InputError(
            f"The corpus {corpus.name} holds 0 tokens in whole contexts of {context_length}, not "
            "even one; use a shorter --context-length or a larger corpus."
        )
    raise InputError(
        f"The corpus {corpus.name} holds {n_tokens:,} tokens in whole contexts of "
        f"{context_length}, fewer than the {min_tokens:,} requested; use --tokens {n_tokens} "
        "or a larger corpus, or take all of it with --tokens all."
    )


def _first_contexts(window: TokenizedText) -> np.ndarray:
    """Find, for each document that begins in a window, the first context with a part of it.

    Contexts are in the order of the store, in which the last part of a document may come first. A
    document that began in an earlier window was listed there, since windows follow one another.
    """
    documents, first_pieces = np.unique(window.pieces["document"], return_index=True)
    begins_here = np.isin(documents, window.documents["document"])
    return window.pieces["context"][first_pieces[begins_here]]


def _part(window: TokenizedText, first: int, last: int, listed_in: np.ndarray) -> TokenizedText:
    """Take contexts [first, last) of the store, all in one window.

    `listed_in` [documents] holds the context with which each document of the window is listed.
    """
    contexts = window.pieces["context"]
    start, stop = np.searchsorted(contexts, [first, last])
    tokens = slice(first - contexts[0], last - contexts[0])
    documents = (first <= listed_in) & (listed_in < last)
    return window.part(tokens, slice(start, stop), documents)


def _shard(number: int, parts: list[TokenizedText], window: int) -> Shard:
    """Make a shard from parts, without activations; `window` is the number of its first window."""
    text = joined(parts)
    with_text = TEXT_FIELD.name in text.documents
    schema = DOCUMENT_SCHEMA.append(TEXT_FIELD) if with_text else DOCUMENT_SCHEMA
    return Shard(
        number=number,
        tokens=text.tokens,
        pieces=pa.table(text.pieces, PIECE_SCHEMA),
        documents=pa.table(text.documents, schema),
        cursor={"window": window} | asdict(text.cursor),
    )
