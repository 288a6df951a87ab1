"""Contexts by shard: what a worker harvests, and what the store keeps about its text.

Shards take the contexts of the windows one after the other. Which they get, and which documents
they list, does not depend on where in the corpus reading began.
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
    seen_hashes: Iterable[Hashes] = (),
    keep_text: bool = False,
) -> Iterator[Shard]:
    """Shards `first_shard` to `n_shards - 1`; where the corpus ends, a short one is the last.

    They come without activations.

    Args:
        at_least: contexts that the corpus must hold, those of earlier shards included.
        cursor: of any shard up to `first_shard`; the nearer, the less is read in vain. The shards
            are the same as without one.
        seen_hashes: see `iter_windows`; of all documents below `cursor["document"]`, which the
            shards before `first_shard` have listed.
        keep_text: the documents come with their text.

    Raises:
        InputError: the corpus holds fewer contexts than `at_least`. Said before the last window is
            handed out, unless that is a full one.
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
        del window  # before the next one is made
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
        f"{context_length}, fewer than the {min_tokens:,} asked for; ask for --tokens {n_tokens} "
        "or a larger corpus, or take what there is with --tokens all."
    )


def _first_contexts(window: TokenizedText) -> np.ndarray:
    """For each document that begins in a window, the first context with a part of it.

    In the order of the store, in which the last part of a document may be the first. A document
    that began in an earlier window was listed there: all of a window comes before the next one.
    """
    documents, first_pieces = np.unique(window.pieces["document"], return_index=True)
    begins_here = np.isin(documents, window.documents["document"])
    return window.pieces["context"][first_pieces[begins_here]]


def _part(window: TokenizedText, first: int, last: int, listed_in: np.ndarray) -> TokenizedText:
    """Contexts [first, last) of the store, all of one window.

    `listed_in` [documents] has the context with which each document of the window is listed.
    """
    contexts = window.pieces["context"]
    start, stop = np.searchsorted(contexts, [first, last])
    tokens = slice(first - contexts[0], last - contexts[0])
    documents = (first <= listed_in) & (listed_in < last)
    return window.part(tokens, slice(start, stop), documents)


def _shard(number: int, parts: list[TokenizedText], window: int) -> Shard:
    """The shard of these parts, without activations; `window` has the number of its first one."""
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
