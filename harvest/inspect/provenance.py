"""The origin of a row: its token, context, document and exact characters.

The store records the document of each piece, and the characters of the whole piece. The characters
of a token are found by tokenizing the document again. Its text is in the store if texts are kept;
otherwise it is read from the corpus, from the place that the shard's commit record names. A text is
used only if its hash is the recorded one.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt
import xxhash
from pydantic import ValidationError
from rich.table import Column, Table
from rich.text import Text

from sae_harvest.common.errors import DamagedError, InputError
from sae_harvest.common.parsing import first_line
from sae_harvest.store.reader import ActivationStore
from sae_harvest.store.rules import OUTLIER_MEDIANS

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

AROUND_CHARS = 160  # characters of text shown on each side of the token
AROUND_TOKENS = 32  # tokens decoded on each side if there is no text


@dataclass(frozen=True, slots=True)
class RowNorm:
    """A row's norm at one site."""

    norm: float
    """The norm itself."""
    median: float
    """Median norm of the rows of its shard."""
    outlier: bool
    """True for an outlier row."""


@dataclass(frozen=True, slots=True)
class Piece:
    """The part of a document that a row lies in."""

    document: int
    """Number of the document."""
    text_hash: int
    """xxh3-64 of its text."""
    token: int
    """Index of the row among the document's tokens; `n_tokens` for the end-of-text token."""
    char_start: int
    """First character of the piece in the document."""
    char_end: int
    """One more than its last character."""


@dataclass(frozen=True, slots=True)
class Provenance:
    """The origin of a row: token, context, document and characters.

    >>> trace_row("runs/demo/store", 37).norms["resid_post.1"].outlier
    False
    """

    row: int
    """Number of the row."""
    context: int
    """Number of its context."""
    position: int
    """Position in the context."""
    token: int
    """Id of the token."""
    kind: Literal["text", "end of text", "beginning of text"]
    """Kind of the token. Only text has characters; a BOS has no document either."""
    token_text: str | None
    """The token decoded by itself; None without the tokenizer. Half a character is U+FFFD."""
    document: dict[str, Any] | None
    """Columns of documents/; None for a BOS."""
    piece: Piece | None
    """The piece that holds the token; None for a BOS."""
    characters: tuple[int, int] | None
    """[start, end) of the token in the document; None for a special token, and without the text.

    A token that holds only some bytes of a character has that whole character."""
    around: tuple[str, str, str]
    """Text before, of and after the token; decoded tokens where there is no text."""
    norms: dict[str, RowNorm]
    """Norms of the row, by site."""
    reason: str | None
    """The reason why the token's own characters are not known; None if they are."""


def trace_row(store: ActivationStore | str | Path, row: int) -> Provenance:
    """Find where a row of a sealed store comes from.

    >>> provenance = trace_row("runs/demo/store", 37)
    >>> provenance.context, provenance.position, provenance.kind
    (1, 5, 'text')

    Args:
        store: an open store, or the path or `s3://bucket/prefix` of one.
        row: number of the row, from 0.

    Raises:
        InputError: there is no such row.
        NotAStoreError, UnfinishedError, DamagedError: as `ActivationStore.open` and reading.
    """
    if not isinstance(store, ActivationStore):
        store = ActivationStore.open(store)
    if not 0 <= row < store.n_rows:
        raise InputError(f"{store.place} has the rows 0 to {store.n_rows - 1}, got --row {row}.")
    context, position = divmod(row, store.context_length)
    shard = row // store.shard_rows
    ids = store.tokens(context, context + 1)[0]
    tokenizer, reason = _tokenizer_or_reason(store)
    piece = _piece(store, shard, context, position)
    document = None if piece is None else _document(store, shard, piece.document)
    is_end = piece is not None and document is not None and piece.token == document["n_tokens"]
    characters, around = None, _decoded(tokenizer, ids, position)
    if piece is not None and document is not None and tokenizer is not None:
        try:
            text = document.get("text") or _corpus_text(store, shard, piece)
            start = end = len(text)
            if not is_end:
                start, end = _characters(tokenizer, text, piece.token, int(ids[position]))
                characters = start, end
            around = text[max(0, start - AROUND_CHARS) : start], text[start:end], text[end:]
        except InputError as error:
            reason = str(error)
            if not store.plan["document_text"]:
                reason += " Harvest with --keep-text to have the texts in the store."
    return Provenance(
        row=row,
        context=context,
        position=position,
        token=int(ids[position]),
        kind="beginning of text" if piece is None else "end of text" if is_end else "text",
        token_text=None if tokenizer is None else tokenizer.decode([int(ids[position])]),
        document=document,
        piece=piece,
        characters=characters,
        around=(around[0], around[1], around[2][:AROUND_CHARS]),
        norms={site: _norm(store, site, shard, row) for site in store.sites},
        reason=reason,
    )


def describe_row(place: str | Path, row: int) -> list[Table]:
    """Describe the origin of a row, for a terminal."""
    provenance = trace_row(place, row)
    table = Table(f"row {row:,}", Column(str(place), overflow="fold"), box=None)
    table.add_row("context", f"{provenance.context:,}, position {provenance.position}")
    name = "" if provenance.token_text is None else f"{provenance.token_text!r}, "
    mark = "" if provenance.kind == "text" else f", the mark of the {provenance.kind}"
    table.add_row("token", f"{name}id {provenance.token}{mark}")
    if provenance.document is None:
        table.add_row("document", "none: the token was put before the context")
    else:
        number, name = provenance.document["document"], provenance.document["id"]
        table.add_row("document", f"number {number:,}, id {name}")
        for column in ("source", "title", "url"):
            if provenance.document.get(column):
                table.add_row(column, provenance.document[column])
        table.add_row("characters", _describe_characters(provenance))
    before, token, after = (part.replace("\n", "⏎") for part in provenance.around)
    table.add_row("text", Text.assemble(before, "⟦", (token, "bold"), "⟧", after))
    for site, norm in provenance.norms.items():
        text = f"{norm.norm:,.2f}, {norm.norm / norm.median:,.2f} medians of its shard"
        table.add_row(f"norm at {site}", text + ": an outlier row" * norm.outlier)
    return [table]


def tokenizer_of(store: ActivationStore) -> PreTrainedTokenizerFast:
    """Load the tokenizer that a store was harvested with.

    Raises:
        InputError: it is not at its recorded place, or has changed.
    """
    from sae_harvest.harvest.model.models import (
        load_tokenizer,
        resolve_model,
        tokenizer_fingerprint,
    )

    model = store.plan["model"]
    tokenizer = load_tokenizer(resolve_model(model["name"], model.get("revision")))
    expected = store.plan["tokenizer"].get("xxh3")
    if tokenizer_fingerprint(tokenizer) != expected:
        raise InputError(f"The tokenizer of {model['name']} has changed since the harvest.")
    return tokenizer


def _tokenizer_or_reason(
    store: ActivationStore,
) -> tuple[PreTrainedTokenizerFast | None, str | None]:
    try:
        return tokenizer_of(store), None
    except InputError as error:
        return None, str(error)


def _piece(store: ActivationStore, shard: int, context: int, position: int) -> Piece | None:
    """Find the piece that holds a position; None for a BOS."""
    pieces = store.pieces(shard)
    columns = {name: pieces[name].to_numpy() for name in pieces.column_names}
    inside = (
        (columns["context"] == context)
        & (columns["start"] <= position)
        & (position < columns["stop"])
    )
    if not inside.any():
        return None
    at = int(np.flatnonzero(inside)[0])
    return Piece(
        document=int(columns["document"][at]),
        text_hash=int(columns["document_hash"][at]),
        token=int(columns["first_token"][at]) + position - int(columns["start"][at]),
        char_start=int(columns["char_start"][at]),
        char_end=int(columns["char_end"][at]),
    )


def _document(store: ActivationStore, shard: int, number: int) -> dict[str, Any]:
    """Find a document's row in documents/; this shard or an earlier one lists it."""
    for listing in range(shard, -1, -1):
        table = store.documents(listing)
        matches = np.flatnonzero(table["document"].to_numpy() == number)
        if len(matches):
            return table.slice(int(matches[0]), 1).to_pylist()[0]
    raise DamagedError(f"{store.place} lists document {number} nowhere.")


def _corpus_text(store: ActivationStore, shard: int, piece: Piece) -> str:
    """Read the text of a piece's document from the corpus; `InputError` if it is gone."""
    from sae_harvest.harvest.text.corpus import open_corpus
    from sae_harvest.harvest.text.documents import CorpusSpec

    corpus_plan = store.plan["corpus"]
    spec = {name: corpus_plan[name] for name in CorpusSpec.model_fields if name in corpus_plan}
    try:
        corpus = open_corpus(CorpusSpec.model_validate(spec))
    except ValidationError as error:
        raise InputError(
            f"The plan of {store.place} names no corpus: {first_line(error)}."
        ) from None
    changed = InputError(f"The corpus {corpus.name} is not what it was.")
    cursor = store.cursor(shard)
    documents = corpus.documents(cursor["corpus"])
    texts: Iterator[str] = (document.text for document in documents)
    if corpus.dedup:
        # Document numbers leave duplicates out, so the document is found by its text, which is
        # unique. In a changed corpus, the search might never end.
        if corpus.fingerprint() != corpus_plan["fingerprint"]:
            raise changed
        texts = (text for text in texts if _text_hash(text) == piece.text_hash)
    else:
        texts = islice(texts, piece.document - cursor["document"], None)
    text = next(texts, None)
    if text is None or _text_hash(text) != piece.text_hash:
        raise changed
    return text


def _text_hash(text: str) -> int:
    return xxhash.xxh3_64_intdigest(text.encode())


def _characters(
    tokenizer: PreTrainedTokenizerFast, text: str, index: int, token: int
) -> tuple[int, int]:
    """Find the characters [start, end) of a token, given its index in the text."""
    from sae_harvest.harvest.text.documents import Document
    from sae_harvest.harvest.tokens.encoding import DocumentEncoder

    # With contexts of one token, each token is a piece.
    document = Document("", "", None, None, text)
    batch = next(DocumentEncoder(tokenizer).batches([(document, {})], text_length=1))
    if index >= len(batch.tokens) or batch.tokens[index] != token:
        raise InputError("The tokenizer gives other tokens for the document than at the harvest.")
    return int(batch.pieces["char_start"][index]), int(batch.pieces["char_end"][index])


def _decoded(
    tokenizer: PreTrainedTokenizerFast | None, ids: npt.NDArray[np.int32], position: int
) -> tuple[str, str, str]:
    """Return the context's tokens before, at and after a position, as text or as ids."""
    parts = (
        ids[max(0, position - AROUND_TOKENS) : position].tolist(),
        ids[position : position + 1].tolist(),
        ids[position + 1 :][:AROUND_TOKENS].tolist(),
    )
    if tokenizer is None:
        before, token, after = (" ".join(map(str, part)) for part in parts)
    else:
        before, token, after = (tokenizer.decode(part) for part in parts)
    return before, token, after


def _norm(store: ActivationStore, site: str, shard: int, row: int) -> RowNorm:
    norm, median = store.norms(site, row, row + 1)[0], store.norm_median(site, shard)
    return RowNorm(float(norm), median, bool(norm > np.float32(OUTLIER_MEDIANS * median)))


def _describe_characters(provenance: Provenance) -> str:
    assert provenance.document is not None
    assert provenance.piece is not None
    of = f"of {provenance.document['n_chars']:,}"
    if provenance.kind != "text":
        return f"none: it comes after the last {of}"
    if provenance.characters is not None:
        return f"{provenance.characters[0]:,}:{provenance.characters[1]:,} {of}"
    return (
        f"{provenance.piece.char_start:,}:{provenance.piece.char_end:,} {of}: of the whole piece, "
        f"not of the token. {provenance.reason}"
    )
