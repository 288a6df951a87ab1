"""Documents to contexts: tokenized, joined, cut to one length, and shuffled within windows.

The documents of a corpus, each followed by the end-of-text token, make one stream of tokens. The
stream is cut to contexts, a fixed number of contexts makes a window, and each window is shuffled by
itself. The result is a pure function of (corpus, tokenizer, context length, BOS policy, seed,
window): a later request for more tokens continues the same order, and so does a start from the
cursor of any window.

No loop over tokens is in Python; memory holds one window and one batch of documents.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Literal

import numpy as np

from sae_harvest.common.errors import InputError
from sae_harvest.harvest.text.duplicates import Hashes, without_duplicates
from sae_harvest.harvest.tokens.encoding import (
    Columns,
    DocumentEncoder,
    StreamCursor,
    TokenizedText,
    joined,
)
from sae_harvest.store.loading.permutation import permutation

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from sae_harvest.harvest.text.documents import Corpus

Bos = Literal["none", "context"]

WINDOW_CONTEXTS = 16_384  # contexts shuffled together, in the driver's memory


def iter_windows(
    corpus: Corpus,
    tokenizer: PreTrainedTokenizerBase,
    context_length: int,
    bos: Bos,
    seed: int,
    window_contexts: int = WINDOW_CONTEXTS,
    *,
    first_window: int = 0,
    cursor: StreamCursor | None = None,
    seen_hashes: Iterable[Hashes] = (),
    keep_text: bool = False,
) -> Iterator[TokenizedText]:
    """Yield every whole context of the corpus by windows; tokens left over at the end are dropped.

    The contexts of a window are shuffled, and numbered in that order from the start of the corpus.
    With `bos` "context", position 0 of each context is the BOS token and `context_length - 1`
    tokens of text follow.

    Args:
        seed: 0 or more.
        first_window: number of the window to begin with.
        cursor: cursor of that window; None: the start of the corpus. All other arguments must be
            the same as when the cursor was made.
        seen_hashes: if duplicates are left out, the hashes (xxh3-64) of the texts of the documents
            below `cursor.document`.
        keep_text: whether the documents come with their `text`.

    Raises:
        InputError: the tokenizer lacks a necessary token, or the corpus has a fault.
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
    cursor = cursor or StreamCursor()
    documents = corpus.placed(cursor.corpus)
    if corpus.dedup:
        documents = without_duplicates(documents, seen_hashes)
    batches = DocumentEncoder(tokenizer).batches(documents, text_length, cursor, keep_text)
    prefix = np.array([tokenizer.bos_token_id] * n_bos, dtype=np.int32)
    return _windows(batches, text_length, window_contexts, first_window, seed, prefix)


def _windows(
    batches: Iterator[TokenizedText],
    text_length: int,
    window_contexts: int,
    number: int,
    seed: int,
    prefix: np.ndarray,
) -> Iterator[TokenizedText]:
    """Yield the stream as windows from `number` on; its first token is in the first batch."""
    first = number * window_contexts
    parts: list[TokenizedText] = []  # the stream read so far, from context `first` on
    n_tokens = 0
    for batch in batches:
        _, rest = _split(batch, first)
        n_tokens += len(rest.tokens)
        while n_tokens >= window_contexts * text_length:
            end, rest = _split(rest, first + window_contexts)
            window = joined([*parts, end])
            parts, n_tokens = [], len(rest.tokens)
            window = _shuffled(window, text_length, number, seed, prefix)
            yield window
            del window  # free the memory before the next window is made
            number, first = number + 1, first + window_contexts
        if n_tokens:
            parts.append(rest)
    if n_contexts := n_tokens // text_length:
        window, _ = _split(joined(parts), first + n_contexts)
        yield _shuffled(window, text_length, number, seed, prefix)


def _split(text: TokenizedText, context: int) -> tuple[TokenizedText, TokenizedText]:
    """Split the stream at the first token of a context."""
    piece = int(np.searchsorted(text.pieces["context"], context))
    token = int((text.pieces["stop"][:piece] - text.pieces["start"][:piece]).sum())
    last_begun = text.pieces["document"][piece - 1] if piece else -1
    document = int(np.searchsorted(text.documents["document"], last_begun, side="right"))
    before = text.part(slice(token), slice(piece), slice(document))
    return before, text.part(slice(token, None), slice(piece, None), slice(document, None))


def _shuffled(
    stream: TokenizedText, text_length: int, number: int, seed: int, prefix: np.ndarray
) -> TokenizedText:
    """Shuffle a window's contexts by `seed`, and put `prefix`, int32 [n_bos], before each."""
    n_bos = len(prefix)
    text = stream.tokens.reshape(-1, text_length)
    generator = np.random.PCG64(np.random.SeedSequence([seed, number]))
    order = permutation(generator, len(text))
    tokens = np.empty((len(order), n_bos + text_length), dtype=np.int32)
    tokens[:, :n_bos] = prefix
    np.take(text, order, axis=0, out=tokens[:, n_bos:], mode="clip")
    return replace(stream, tokens=tokens, pieces=_reordered(stream.pieces, order, n_bos))


def _reordered(pieces: Columns, order: np.ndarray, n_bos: int) -> Columns:
    """Reorder the pieces of a window as its contexts, with `n_bos` tokens before each context.

    A context's pieces keep their order.
    """
    first = pieces["context"][0]
    rank = np.empty(len(order), dtype=np.int64)
    rank[order] = np.arange(len(order))
    context = first + rank[pieces["context"] - first]
    by_context = np.argsort(context, kind="stable")
    pieces = {name: column[by_context] for name, column in pieces.items()}
    pieces["context"] = context[by_context]
    pieces["start"] = pieces["start"] + np.int32(n_bos)
    pieces["stop"] = pieces["stop"] + np.int32(n_bos)
    return pieces
