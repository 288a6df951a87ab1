"""Documents to tokens: a batch of documents becomes a run of the token stream, and its pieces.

A piece is the part of a document that lies in one context. The character span of a piece comes from
the tokenizer's offsets. The offsets are read at the borders of pieces only: reading them for every
token costs more than a tenth of the time of tokenizing.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import xxhash

from sae_harvest.common.errors import InputError
from sae_harvest.harvest.tokens.segments import Segment, segments
from sae_harvest.store.tables import TEXT_FIELD

if TYPE_CHECKING:
    from tokenizers import Encoding
    from transformers import PreTrainedTokenizerBase

    from sae_harvest.harvest.text.documents import Cursor, Document

Columns = dict[str, np.ndarray]

BATCH_DOCUMENTS = 64
BATCH_CHARS = 4_000_000
ENCODED_CHARS = 1_000_000  # tokenized at a time; needs 0.15 GB for that time

# Tokens between documents in pretraining. The EOS token of a chat model ends a turn instead.
_END_OF_TEXT = ("<|endoftext|>", "<|end_of_text|>")


@dataclass(frozen=True)
class StreamCursor:
    """A place in the stream of tokens where a batch of documents begins."""

    corpus: Cursor | None = None
    """Cursor of the corpus; None at its first document."""
    document: int = 0
    """Number of the batch's first document."""
    token: int = 0
    """Number of the batch's first token."""


@dataclass(frozen=True)
class TokenizedText:
    """Part of the stream: a batch of documents, a window of contexts, or a part of one of them."""

    tokens: np.ndarray
    """int32 [tokens] for a batch, [contexts, context_length] for a window."""
    pieces: Columns
    """Columns of PIECE_SCHEMA, sorted by (context, start); positions in a batch leave BOS out."""
    documents: Columns
    """Columns of DOCUMENT_SCHEMA, and TEXT_FIELD if asked for: the documents that begin here.

    Their numbers ascend."""
    cursor: StreamCursor
    """Start of the batch that holds the first token, in the order of the corpus."""

    def part(self, tokens: slice, pieces: slice, documents: slice | np.ndarray) -> TokenizedText:
        """Select some rows of each array, without copying."""
        return TokenizedText(
            tokens=self.tokens[tokens],
            pieces={name: column[pieces] for name, column in self.pieces.items()},
            documents={name: column[documents] for name, column in self.documents.items()},
            cursor=self.cursor,
        )


def joined(parts: Sequence[TokenizedText]) -> TokenizedText:
    """Join consecutive parts; the arrays are copied."""

    def columns(tables: list[Columns]) -> Columns:
        return {name: np.concatenate([table[name] for table in tables]) for name in tables[0]}

    return TokenizedText(
        tokens=np.concatenate([part.tokens for part in parts]),
        pieces=columns([part.pieces for part in parts]),
        documents=columns([part.documents for part in parts]),
        cursor=parts[0].cursor,
    )


def end_of_text_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the token after each document: that of pretraining if there is one, else the EOS.

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

    Control tokens that appear in a text are tokenized like any other characters. Nothing is
    truncated, padded or added around a text, and offsets keep their leading spaces. (Unigram
    vocabularies that list their control tokens, such as XGLM's, still match them in text.)
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

    def batches(
        self,
        documents: Iterable[tuple[Document, Cursor]],
        text_length: int,
        cursor: StreamCursor | None = None,
        keep_text: bool = False,
    ) -> Iterator[TokenizedText]:
        """Yield the stream, cut to contexts of `text_length` tokens, by batches of documents.

        From the cursor of any batch, the stream continues as it did from the first document.
        """
        cursor = cursor or StreamCursor()
        for group, after in _grouped(documents):
            batch = self._encode(group, cursor, text_length, keep_text)
            yield batch
            n_documents, n_tokens = cursor.document + len(group), cursor.token + len(batch.tokens)
            cursor = StreamCursor(after, n_documents, n_tokens)

    def _encode(
        self, group: list[Document], cursor: StreamCursor, text_length: int, keep_text: bool
    ) -> TokenizedText:
        texts = self._tokenized([document.text for document in group], cursor.token, text_length)
        lengths = np.array([text.n_tokens for text in texts], dtype=np.int64)
        columns: Columns = {
            "document": cursor.document + np.arange(len(group)),
            "text_hash": np.array(
                [xxhash.xxh3_64_intdigest(document.text.encode()) for document in group],
                dtype=np.uint64,
            ),
            "n_chars": np.array([len(document.text) for document in group], dtype=np.int64),
            "n_tokens": lengths,
        }
        for name in ("id", "source", "title", "url", *([TEXT_FIELD.name] if keep_text else [])):
            columns[name] = np.array(
                [getattr(document, name) for document in group], dtype=np.object_
            )
        stops = cursor.token + np.cumsum(lengths + 1)
        which, pieces = _cut(stops - lengths - 1, stops, text_length)
        pieces["document"] = columns["document"][which]
        pieces["document_hash"] = columns["text_hash"][which]
        for name in ("char_start", "char_end"):
            borders = [place for text in texts for place in getattr(text, name)]
            pieces[name] = np.array(borders, dtype=np.int64)
        tokens = np.concatenate([part for text in texts for part in text.tokens])
        return TokenizedText(tokens, pieces, columns, cursor)

    def _tokenized(self, texts: list[str], first_token: int, text_length: int) -> list[_TextTokens]:
        """Tokenize texts, a bounded number of characters at a time."""
        runs = [_TextTokens(text, text_length) for text in texts]
        at = first_token
        for part in self._parted(runs):
            encodings = self._tokenizer.encode_batch(
                [segment.text for _, segment in part], add_special_tokens=False
            )
            for (run, segment), encoding in zip(part, encodings, strict=True):
                run.add(segment, encoding, at)
                at += len(encoding)
                if segment.is_last_of(run.text):
                    run.close(self._end_of_text, at)
                    at += 1
        return runs

    def _parted(self, runs: list[_TextTokens]) -> Iterator[list[tuple[_TextTokens, Segment]]]:
        """Yield segments of texts, in order, up to `ENCODED_CHARS` at a time, or a single one."""
        part: list[tuple[_TextTokens, Segment]] = []
        n_chars = 0
        for run in runs:
            for segment in segments(run.text, self._tokenizer):
                if part and n_chars + len(segment.text) > ENCODED_CHARS:
                    yield part
                    part, n_chars = [], 0
                part.append((run, segment))
                n_chars += len(segment.text)
        yield part


class _TextTokens:
    """The tokens of one text, and the characters at both ends of each of its pieces."""

    def __init__(self, text: str, text_length: int) -> None:
        self.text = text
        self.tokens: list[np.ndarray] = []  # int32, to be joined; the last: the end-of-text token
        self.n_tokens = 0  # without the end-of-text token
        # First character of each piece's first token, and end of its last one; both are the end of
        # the text if the piece is only an end-of-text token.
        self.char_start: list[int] = []
        self.char_end: list[int] = []
        self._text_length = text_length
        self._end = 0  # end of the last token so far

    def add(self, segment: Segment, encoding: Encoding, at: int) -> None:
        """Add the tokens of the next segment, which begin at token `at` of the stream."""
        size = len(encoding)
        if not size:
            return
        borders = range(-at % self._text_length, size, self._text_length)
        if not self.n_tokens and 0 not in borders:
            self.char_start.append(_characters(segment, encoding, 0)[0])
        for token in borders:
            if token:
                self._end = _characters(segment, encoding, token - 1)[1]
            if self.char_start:
                self.char_end.append(self._end)
            self.char_start.append(_characters(segment, encoding, token)[0])
        self._end = _characters(segment, encoding, size - 1)[1]
        self.tokens.append(np.array(encoding.ids, dtype=np.int32))
        self.n_tokens += size

    def close(self, end_of_text: int, at: int) -> None:
        """Add the end-of-text token, token `at` of the stream, after the text."""
        if self.char_start:
            self.char_end.append(self._end)
        if not self.char_start or at % self._text_length == 0:
            self.char_start.append(len(self.text))
            self.char_end.append(len(self.text))
        self.tokens.append(np.array([end_of_text], dtype=np.int32))


def _characters(segment: Segment, encoding: Encoding, token: int) -> tuple[int, int]:
    """Return the first character, in the text, of a token of a segment, and the end."""
    begin, end = encoding.token_to_chars(token)  # type: ignore[misc]  # None for special tokens
    return segment.start + begin - (0 if token else segment.before), segment.start + end


def _grouped(
    documents: Iterable[tuple[Document, Cursor]],
) -> Iterator[tuple[list[Document], Cursor]]:
    """Yield up to 64 documents at a time, fewer if they are long, and the cursor after them."""
    group: list[Document] = []
    n_chars = 0
    after: Cursor = {}
    for document, after in documents:
        group.append(document)
        n_chars += len(document.text)
        if len(group) == BATCH_DOCUMENTS or n_chars >= BATCH_CHARS:
            yield group, after
            group, n_chars = [], 0
    if group:
        yield group, after


def _cut(starts: np.ndarray, stops: np.ndarray, text_length: int) -> tuple[np.ndarray, Columns]:
    """Cut runs [starts, stops) of the stream, int64 [runs], at multiples of `text_length`.

    Returns the run of each piece, int64 [pieces], and the pieces' places.
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
