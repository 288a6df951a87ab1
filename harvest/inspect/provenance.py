"""Where a row comes from: its token, its context, its document, the very characters.

The store knows which document a row's context was cut from, and which characters all of that piece
has. The token's own are found by tokenizing the document again: from the text that the store keeps,
or read anew from the corpus, near which the shard's commit record remembers to be. A text counts
only if its hash is the recorded one.
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
from rich.table import Column, Table
from rich.text import Text

from sae_harvest.common.errors import DamagedError, InputError
from sae_harvest.store.reader import ActivationStore
from sae_harvest.store.rules import OUTLIER_MEDIANS

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

AROUND_CHARS = 160  # of text shown on each side of the token
AROUND_TOKENS = 32  # decoded in its place where there is no text


@dataclass(frozen=True, slots=True)
class RowNorm:
    """A row's norm at one site, the median of its shard's, and whether it is an outlier row."""

    norm: float
    median: float
    outlier: bool


@dataclass(frozen=True, slots=True)
class Piece:
    """The part of a document that a row lies in; characters [char_start, char_end) of it.

    token is the row's index among the document's tokens, n_tokens for the end-of-text token.
    """

    document: int
    text_hash: int
    token: int
    char_start: int
    char_end: int


@dataclass(frozen=True, slots=True)
class Provenance:
    """The origin of a row: token, context, document and characters.

    >>> trace_row("runs/demo/store", 37).norms["resid_post.1"].outlier
    False

    Attributes:
        kind: "text", or which mark the token is; marks belong to no characters, and a BOS to no
            document either.
        token_text: the token decoded by itself; None if the tokenizer is not at hand. Half a
            character decodes to U+FFFD.
        document: columns of documents/; None for a BOS.
        characters: [start, end) of the token in the document; a token of some of a character's
            bytes has that character. None for a mark, and where the text is not at hand.
        around: text before, of and after the token; decoded tokens where there is no text.
        norms: by site.
        reason: why the token's own characters are not known, if they are not.
    """

    row: int
    context: int
    position: int
    token: int
    kind: Literal["text", "end of text", "beginning of text"]
    token_text: str | None
    document: dict[str, Any] | None
    piece: Piece | None
    characters: tuple[int, int] | None
    around: tuple[str, str, str]
    norms: dict[str, RowNorm]
    reason: str | None


def trace_row(store: ActivationStore | str | Path, row: int) -> Provenance:
    """Find where a row of a sealed store comes from.

    >>> found = trace_row("runs/demo/store", 37)
    >>> found.context, found.position, found.kind
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
    """Where a row comes from, for a terminal."""
    found = trace_row(place, row)
    table = Table(f"row {row:,}", Column(str(place), overflow="fold"), box=None)
    table.add_row("context", f"{found.context:,}, position {found.position}")
    name = "" if found.token_text is None else f"{found.token_text!r}, "
    mark = "" if found.kind == "text" else f", the mark of the {found.kind}"
    table.add_row("token", f"{name}id {found.token}{mark}")
    if found.document is None:
        table.add_row("document", "none: the token was put before the context")
    else:
        number, name = found.document["document"], found.document["id"]
        table.add_row("document", f"number {number:,}, id {name}")
        for column in ("source", "title", "url"):
            if found.document.get(column):
                table.add_row(column, found.document[column])
        table.add_row("characters", _characters_told(found))
    before, own, after = (part.replace("\n", "⏎") for part in found.around)
    table.add_row("text", Text.assemble(before, "⟦", (own, "bold"), "⟧", after))
    for site, norm in found.norms.items():
        told = f"{norm.norm:,.2f}, {norm.norm / norm.median:,.2f} medians of its shard"
        table.add_row(f"norm at {site}", told + ": an outlier row" * norm.outlier)
    return [table]


def tokenizer_of(store: ActivationStore) -> PreTrainedTokenizerFast:
    """The tokenizer a store was harvested with.

    Raises:
        InputError: it is not where it was, or is another one now.
    """
    from sae_harvest.harvest.model.models import (
        load_tokenizer,
        resolve_model,
        tokenizer_fingerprint,
    )

    model = store.plan["model"]
    tokenizer = load_tokenizer(resolve_model(model["name"], model.get("revision")))
    planned = store.plan["tokenizer"].get("xxh3")
    if tokenizer_fingerprint(tokenizer) != planned:
        raise InputError(f"The tokenizer of {model['name']} is another one now.")
    return tokenizer


def _tokenizer_or_reason(
    store: ActivationStore,
) -> tuple[PreTrainedTokenizerFast | None, str | None]:
    try:
        return tokenizer_of(store), None
    except InputError as error:
        return None, str(error)


def _piece(store: ActivationStore, shard: int, context: int, position: int) -> Piece | None:
    """The piece that holds a position, None for a BOS."""
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
    """A document's row of documents/; it is listed in this shard or in one before."""
    for listing in range(shard, -1, -1):
        table = store.documents(listing)
        found = np.flatnonzero(table["document"].to_numpy() == number)
        if len(found):
            return table.slice(int(found[0]), 1).to_pylist()[0]
    raise DamagedError(f"{store.place} lists document {number} nowhere.")


def _corpus_text(store: ActivationStore, shard: int, piece: Piece) -> str:
    """The text of a piece's document, from the corpus; `InputError` if it is not there any more."""
    from sae_harvest.harvest.text.corpus import open_corpus
    from sae_harvest.harvest.text.documents import CorpusSpec

    planned = store.plan["corpus"]
    spec = {name: planned[name] for name in CorpusSpec.model_fields if name in planned}
    corpus = open_corpus(CorpusSpec.model_validate(spec))
    changed = InputError(f"The corpus {corpus.name} is not what it was.")
    cursor = store.cursor(shard)
    documents = corpus.documents(cursor["corpus"])
    texts: Iterator[str] = (document.text for document in documents)
    if corpus.dedup:
        # Numbers leave duplicates out, so it is found by its text, which is nowhere else; in a
        # corpus that has changed, the search might never end.
        if corpus.fingerprint() != planned["fingerprint"]:
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
    """Characters [start, end) of a token of a text, given its index there."""
    from sae_harvest.harvest.text.documents import Document
    from sae_harvest.harvest.tokens.encoding import DocumentEncoder

    # Contexts of one token make a piece of each.
    document = Document("", "", None, None, text)
    batch = next(DocumentEncoder(tokenizer).batches([(document, {})], text_length=1))
    if index >= len(batch.tokens) or batch.tokens[index] != token:
        raise InputError("The tokenizer gives other tokens for the document than it did.")
    return int(batch.pieces["char_start"][index]), int(batch.pieces["char_end"][index])


def _decoded(
    tokenizer: PreTrainedTokenizerFast | None, ids: npt.NDArray[np.int32], position: int
) -> tuple[str, str, str]:
    """Tokens of the context before, at and after a position, as text or as ids."""
    parts = (
        ids[max(0, position - AROUND_TOKENS) : position].tolist(),
        ids[position : position + 1].tolist(),
        ids[position + 1 :][:AROUND_TOKENS].tolist(),
    )
    if tokenizer is None:
        before, own, after = (" ".join(map(str, part)) for part in parts)
    else:
        before, own, after = (tokenizer.decode(part) for part in parts)
    return before, own, after


def _norm(store: ActivationStore, site: str, shard: int, row: int) -> RowNorm:
    norm, median = store.norms(site, row, row + 1)[0], store.norm_median(site, shard)
    return RowNorm(float(norm), median, bool(norm > np.float32(OUTLIER_MEDIANS * median)))


def _characters_told(found: Provenance) -> str:
    assert found.document is not None
    assert found.piece is not None
    of = f"of {found.document['n_chars']:,}"
    if found.kind != "text":
        return f"none: it stands after the last {of}"
    if found.characters is not None:
        return f"{found.characters[0]:,}:{found.characters[1]:,} {of}"
    return (
        f"{found.piece.char_start:,}:{found.piece.char_end:,} {of}: of the whole piece, not of the "
        f"token. {found.reason}"
    )
