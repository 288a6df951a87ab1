"""Documents to contexts: tokenized, joined, cut to one length, and shuffled within windows.

The documents of a corpus, each followed by the end-of-text token, make one stream of tokens. The
stream is cut to contexts, a fixed number of contexts makes a window, and each window is shuffled by
itself. What comes out is a pure function of (corpus, tokenizer, context length, BOS policy, seed,
window): asking for more tokens later continues the same order, and so does starting from the cursor
of any window.

Nothing here loops over tokens in Python; memory holds one window and one batch of documents.
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

WINDOW_CONTEXTS = 16_384  # shuffled together; each window more would be memory of the driver


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
    """Every whole context of the corpus, window after window; tokens left over at the end go.

    The contexts of a window are shuffled, and numbered in that order from the start of the corpus.
    With `bos` "context", position 0 of each context is the BOS token and `context_length - 1`
    tokens of text follow.

    Args:
        seed: 0 or more.
        first_window: number of the window to begin with.
        cursor: of that window; the start of the corpus when not given. All other arguments must be
            those it was made with.
        seen_hashes: where the corpus is read without duplicates, the hashes (xxh3-64) of the texts
            of the documents below `cursor.document`.
        keep_text: the documents come with their `text`.

    Raises:
        InputError: a tokenizer without the tokens needed, and whatever is wrong with the corpus.
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
    """The stream as windows from `number` on, whose first token is in the first batch."""
    first = number * window_contexts
    parts: list[TokenizedText] = []  # the stream from context `first` on, as far as it was read
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
            del window  # before the next one is made
            number, first = number + 1, first + window_contexts
        if n_tokens:
            parts.append(rest)
    if n_contexts := n_tokens // text_length:
        window, _ = _split(joined(parts), first + n_contexts)
        yield _shuffled(window, text_length, number, seed, prefix)


def _split(text: TokenizedText, context: int) -> tuple[TokenizedText, TokenizedText]:
    """The stream before the first token of a context, and from there on."""
    piece = int(np.searchsorted(text.pieces["context"], context))
    token = int((text.pieces["stop"][:piece] - text.pieces["start"][:piece]).sum())
    last_begun = text.pieces["document"][piece - 1] if piece else -1
    document = int(np.searchsorted(text.documents["document"], last_begun, side="right"))
    before = text.part(slice(token), slice(piece), slice(document))
    return before, text.part(slice(token, None), slice(piece, None), slice(document, None))


def _shuffled(
    stream: TokenizedText, text_length: int, number: int, seed: int, prefix: np.ndarray
) -> TokenizedText:
    """The contexts of a window in the order of `seed`, each with `prefix` int32 [n_bos] before."""
    n_bos = len(prefix)
    text = stream.tokens.reshape(-1, text_length)
    generator = np.random.PCG64(np.random.SeedSequence([seed, number]))
    order = permutation(generator, len(text))
    tokens = np.empty((len(order), n_bos + text_length), dtype=np.int32)
    tokens[:, :n_bos] = prefix
    np.take(text, order, axis=0, out=tokens[:, n_bos:], mode="clip")
    return replace(stream, tokens=tokens, pieces=_reordered(stream.pieces, order, n_bos))


def _reordered(pieces: Columns, order: np.ndarray, n_bos: int) -> Columns:
    """The pieces of a window after its contexts were put in `order`, and `n_bos` put before each.

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
