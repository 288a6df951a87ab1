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
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from sae_harvest.common.errors import InputError
from sae_harvest.harvest.text.duplicates import Hashes, without_duplicates
from sae_harvest.harvest.tokens.encoding import Columns, DocumentEncoder, EncodedDocuments, Start
from sae_harvest.store.loading.permutation import permutation

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from sae_harvest.harvest.text.documents import Corpus

Bos = Literal["none", "context"]

WINDOW_CONTEXTS = 16_384  # shuffled together; each window more would be memory of the driver


@dataclass(frozen=True)
class Window:
    """A run of consecutive contexts, in shuffled order.

    first_context  number of the first one, counted from the start of the corpus
    tokens         int32 [contexts, context_length]
    pieces         columns as in `ShardInput.pieces`, sorted by (context, start)
    documents      columns as in `ShardInput.documents`: the documents that begin in this window,
                   whose numbers are consecutive
    cursor         where `iter_contexts` can begin so that this is its first window, in values that
                   JSON keeps: `window`, its number; `corpus`, `document` and `token`, where in the
                   corpus and in the stream the documents were read that it begins with
    """

    first_context: int
    tokens: np.ndarray
    pieces: Columns
    documents: Columns
    cursor: dict[str, Any]


def iter_contexts(
    corpus: Corpus,
    tokenizer: PreTrainedTokenizerBase,
    context_length: int,
    bos: Bos,
    seed: int,
    window_contexts: int = WINDOW_CONTEXTS,
    *,
    cursor: dict[str, Any] | None = None,
    seen: Iterable[Hashes] = (),
    keep_text: bool = False,
) -> Iterator[Window]:
    """Every whole context of the corpus, window after window; tokens left over at the end go.

    With `bos` "context", position 0 of each context is the BOS token and `context_length - 1`
    tokens of text follow.

    Args:
        seed: 0 or more.
        cursor: of the window to begin with; the first when not given. All other arguments must be
            those it was made with.
        seen: where the corpus is read without duplicates, the hashes (xxh3-64) of the texts of the
            documents below `cursor["document"]`.
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
    first, start = 0, Start()
    if cursor:
        first = cursor["window"]
        start = Start(cursor["corpus"], cursor["document"], cursor["token"])
    placed = corpus.placed(start.corpus)
    if corpus.dedup:
        placed = without_duplicates(placed, seen)
    batches = DocumentEncoder(tokenizer).batches(placed, text_length, start, keep_text)
    prefix = np.array([tokenizer.bos_token_id] * n_bos, dtype=np.int32)
    # Mapped, so that nobody here holds a window while the next one is made.
    windows = _windows(batches, text_length, window_contexts, first)
    return map(partial(_shuffled, seed=seed, prefix=prefix), windows)


def _shuffled(stream: Window, seed: int, prefix: np.ndarray) -> Window:
    """The contexts of a window in the order of `seed`, each with `prefix` int32 [n_bos] before."""
    n_bos = len(prefix)
    generator = np.random.PCG64(np.random.SeedSequence([seed, stream.cursor["window"]]))
    order = permutation(generator, len(stream.tokens))
    tokens = np.empty((len(order), n_bos + stream.tokens.shape[1]), dtype=np.int32)
    tokens[:, :n_bos] = prefix
    np.take(stream.tokens, order, axis=0, out=tokens[:, n_bos:], mode="clip")
    return Window(
        first_context=stream.first_context,
        tokens=tokens,
        pieces=_reordered(stream, order, n_bos),
        documents=stream.documents,
        cursor=stream.cursor,
    )


def _windows(
    batches: Iterator[EncodedDocuments], text_length: int, window_contexts: int, first: int
) -> Iterator[Window]:
    """The stream cut to contexts, in the order of the corpus; tokens [contexts, text_length].

    `first` is the number of the first window, whose first token is in the first batch.
    """
    window_tokens = window_contexts * text_length
    pending = _Pending(first * window_tokens, text_length)
    for batch in batches:
        pending.add(batch)
        while pending.n_tokens >= window_tokens:
            yield pending.cut(first, window_contexts)
            first += 1
    if pending.n_tokens >= text_length:
        yield pending.cut(first, pending.n_tokens // text_length)


class _Pending:
    """The part of the stream that was read and is in no window yet."""

    def __init__(self, token: int, text_length: int) -> None:
        self._text_length = text_length
        self._token = token  # of the stream, the first one pending
        self._tokens: list[np.ndarray] = []
        self._pieces: list[Columns] = []
        self._documents: list[Columns] = []
        self._starts: list[Start] = []

    @property
    def n_tokens(self) -> int:
        return sum(len(tokens) for tokens in self._tokens)

    def add(self, batch: EncodedDocuments) -> None:
        tokens, pieces, documents = batch.tokens, batch.pieces, batch.documents
        before = max(0, self._token - batch.start.token)
        if not self._starts and before:  # of a window that is not asked for
            tokens = tokens[before:]
            context = self._token // self._text_length
            left, pieces = _split(pieces, "context", context)
            _, documents = _split(documents, "document", left["document"][-1] + 1)
        self._tokens.append(tokens)
        self._pieces.append(pieces)
        self._documents.append(documents)
        self._starts.append(batch.start)

    def cut(self, window: int, n_contexts: int) -> Window:
        """Takes the first contexts off what is pending, in the order of the corpus."""
        flat = np.concatenate(self._tokens)
        end = n_contexts * self._text_length
        first_context = self._token // self._text_length
        limit = first_context + n_contexts
        pieces, left_pieces = _split(_joined(self._pieces), "context", limit)
        begun = pieces["document"][-1] + 1
        documents, left_documents = _split(_joined(self._documents), "document", begun)
        start = self._begin()
        self._tokens, self._token = [flat[end:].copy()], self._token + end
        self._pieces, self._documents = [left_pieces], [left_documents]
        self._starts = [s for s in self._starts if s.token >= start.token]
        return Window(
            first_context=first_context,
            tokens=flat[:end].reshape(n_contexts, self._text_length),
            pieces=pieces,
            documents=documents,
            cursor={
                "window": window,
                "corpus": start.corpus,
                "document": start.document,
                "token": start.token,
            },
        )

    def _begin(self) -> Start:
        """Start of the batch that holds the first token pending."""
        return max(
            (start for start in self._starts if start.token <= self._token),
            key=lambda start: start.token,
        )


def _joined(parts: list[Columns]) -> Columns:
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _split(columns: Columns, key: str, limit: int) -> tuple[Columns, Columns]:
    """Rows whose ascending `key` is below `limit`, and the rest."""
    at = int(np.searchsorted(columns[key], limit))
    first = {name: column[:at] for name, column in columns.items()}
    return first, {name: column[at:] for name, column in columns.items()}


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
