"""A corpus: an ordered stream of documents, read from the start or from a cursor.

A cursor says where in the corpus reading goes on, in values that JSON keeps. Every document comes
with the cursor of the place after it, so that whatever was done with the documents so far, none of
them is read again.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from typing import Annotated, Any, ClassVar, NamedTuple, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from sae_harvest.common.errors import InputError
from sae_harvest.common.options import name_or_path
from sae_harvest.common.parsing import first_line
from sae_harvest.common.settings import Option

Row = dict[str, Any]
Cursor = dict[str, Any]
CursorT = TypeVar("CursorT")

NEWS = "news"  # the packaged corpus
_TEXT_COLUMNS = ("text", "content")

SHOWN_COLUMNS = 20  # in a message
SHOWN_CHARS = 60  # of the name of one


class CorpusSpec(BaseModel):
    """The text of a harvest. `config`, `split` and `revision` are for datasets of the Hub only.

    >>> CorpusSpec(name="HuggingFaceFW/fineweb", config="sample-10BT").split
    'train'
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Annotated[str, AfterValidator(name_or_path(NEWS)), Option("Text", "NAME", "--corpus")] = (
        Field(
            NEWS,
            description="dataset on the Hub; a file or folder, also at s3://, of .txt, .jsonl "
            "(.ndjson), .json, .csv or .parquet (.parq) files, all but the last also as .gz or "
            ".zst; or news, the packaged articles (write ./news for a folder of that name)",
        )
    )
    config: Annotated[str | None, Option("Text", name="--dataset-config")] = Field(
        None, description="configuration of the Hub dataset"
    )
    split: str = Field("train", min_length=1, description="split of the Hub dataset")
    revision: str | None = Field(None, description="branch, tag or commit of the Hub dataset")
    text_column: str | None = Field(
        None, description="column that holds the text; none: text, else content"
    )
    dedup: bool = Field(
        False, description="leave out documents whose text, to the letter, came before"
    )


class LeftOut(NamedTuple):
    """Something in a corpus that is not read."""

    name: str
    """Its path, from the folder asked for."""
    why: str
    """The reason, as part of a sentence."""


class Document(NamedTuple):
    """One text, and where it came from."""

    id: str
    """The row's own id, else its number within its file or dataset, counted from 0."""
    source: str
    """The site for news, the path from the folder asked for for files, the id for a dataset."""
    title: str | None
    """None if the row has none; so with `url`."""
    url: str | None
    """Address of the text."""
    text: str
    """The text itself, which may be white space only."""


class Corpus(ABC):
    """A restartable stream of documents in a fixed order. Made by `open_corpus`.

    Attributes:
        full_name: names the corpus so that it is found from any folder.
        dedup: asks whoever reads it to leave out documents that came before.
        n_bytes: of its files as they are stored; None where that is not known.
        left_out: what in it is not read, each with the reason.
        cursor_names: the numbers of which a cursor consists.
    """

    cursor_names: ClassVar[tuple[str, ...]]
    n_bytes: int | None = None
    left_out: Sequence[LeftOut] = ()

    def __init__(self, spec: CorpusSpec, full_name: str | None = None) -> None:
        self.name = spec.name
        self.full_name = full_name or spec.name
        self.dedup = spec.dedup
        self._spec = spec
        self._stopped = False

    def stop(self) -> None:
        """End every stream at its next document, for who does not want the rest."""
        self._stopped = True

    def documents(self, cursor: Cursor | None = None) -> Iterator[Document]:
        """Every document with text, from the first or from a cursor."""
        return (document for document, _ in self.placed(cursor))

    def placed(self, cursor: Cursor | None = None) -> Iterator[tuple[Document, Cursor]]:
        """Every document with text, each with the cursor of the place after it.

        A cursor belongs to a corpus of one fingerprint. Raises InputError where the data cannot be
        read, where there is no text from the first document to the last, and for a cursor of
        another kind of corpus.
        """
        if cursor is not None and set(cursor) != set(self.cursor_names):
            raise InputError(
                f"The place to go on from ({', '.join(sorted(cursor)) or 'empty'}) is none of the "
                f"corpus {self.name}; the record that names it is damaged: run "
                "`harvest verify --repair`."
            )
        empty = cursor is None
        for document, after in self._read(cursor):
            if self._stopped:
                return
            if document.text and not document.text.isspace():
                empty = False
                yield document, after
        if empty:
            raise InputError(
                f"The corpus {self.name} holds no text: every document in it is empty; "
                "choose another --corpus or another --text-column."
            )

    @abstractmethod
    def fingerprint(self) -> str:
        """Identity of what is read: changes when the names or the bytes of the data change."""

    @abstractmethod
    def require_unchanged(self) -> None:
        """`InputError` if the data are not what they were when `fingerprint` was last asked."""

    @abstractmethod
    def _read(self, cursor: Cursor | None) -> Iterator[tuple[Document, Cursor]]:
        """Every document from a cursor on, the empty ones included, and the cursor after each."""


def row_documents(
    rows: Iterable[tuple[str, Row, CursorT]],
    text_column: str | None,
    source: str,
    where: str,
    first: int = 0,
) -> Iterator[tuple[Document, CursorT]]:
    """Rows to documents; a row without text gives an empty one.

    A row comes with its name in messages and the place after it, which is handed on; `first` is
    the number of the first. Columns are found again whenever the names change: JSON lines need not
    all have the same.
    """
    names: tuple[str, ...] | None = None
    columns: dict[str, str] = {}
    for number, (label, row, after) in enumerate(rows, start=first):
        if names != tuple(row):
            names = tuple(row)
            columns = role_columns(names, text_column, f"{where}, {label}")
        values = {role: row[column] for role, column in columns.items()}
        place = f"of {where}, {label},"
        text = _text(values.pop("text"), f"Column {_shown(columns['text'])} {place}")
        described = {
            role: _word(value, f"Column {_shown(columns[role])} {place}")
            for role, value in values.items()
            if value not in (None, "", b"")
        }
        document = Document(
            described.get("id", str(number)),
            source,
            described.get("title"),
            described.get("url"),
            text,
        )
        yield document, after


def role_columns(names: tuple[str, ...], text_column: str | None, where: str) -> dict[str, str]:
    """The column of each role among text, id, title and url; case matters for a given one only."""
    lowered = {name.lower(): name for name in reversed(names)}
    columns = {role: lowered[role] for role in ("id", "title", "url") if role in lowered}
    candidates = [text_column] if text_column in names else []
    if text_column is None:
        candidates = [lowered[name] for name in _TEXT_COLUMNS if name in lowered]
    if not candidates:
        expected = text_column or " or ".join(_TEXT_COLUMNS)
        existing = ", ".join(map(_shown, names[:SHOWN_COLUMNS])) or "none"
        more = len(names) - SHOWN_COLUMNS
        raise InputError(
            f"There is no column {expected} in {where}, which has {existing}"
            f"{f' and {more:,} more' if more > 0 else ''}; "
            "name the one that holds the text with --text-column."
        )
    return columns | {"text": str(candidates[0])}


def _text(value: object, where: str) -> str:
    """The text of a document; bytes are taken for UTF-8, as some writers of Parquet store text."""
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError as error:
            raise InputError(
                f"{where} holds bytes that are not UTF-8; convert them, or name another column "
                "with --text-column."
            ) from error
    if not isinstance(value, str | None):
        raise InputError(
            f"{where} holds {type(value).__name__}, expected text; name another column with "
            "--text-column."
        )
    return _well_formed(value or "")


def _word(value: object, where: str) -> str:
    """An id, a title or a URL."""
    if isinstance(value, bytes):
        return value.decode(errors="replace")
    try:
        return _well_formed(str(value))
    except (RecursionError, ValueError) as error:  # lists in lists, or a number of 5,000 digits
        raise InputError(
            f"{where} cannot be written as text ({first_line(error)}); take the column out."
        ) from error


def _shown(name: str) -> str:
    """A column's name as a message can show it."""
    name = name if len(name) <= SHOWN_CHARS else name[:SHOWN_CHARS] + "…"
    return name if name.isprintable() else ascii(name)[1:-1]


def _well_formed(text: str) -> str:
    """Text with lone surrogates, which JSON can spell and UTF-8 cannot, replaced by U+FFFD."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return text
