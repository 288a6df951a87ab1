"""A corpus: an ordered stream of documents, read from the start or from a cursor.

A cursor is a place in the corpus where reading continues, in values that JSON can store. Every
document comes with the cursor of the place after it, so that no document is read twice.
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

NEWS, PROBES = "news", "probes"  # the packaged corpora
_TEXT_COLUMNS = ("text", "content")

SHOWN_COLUMNS = 20  # columns named in a message
SHOWN_CHARS = 60  # characters of a column's name in a message


class CorpusSpec(BaseModel):
    """The text of a harvest. `config`, `split` and `revision` are for datasets of the Hub only.

    >>> CorpusSpec(name="HuggingFaceFW/fineweb", config="sample-10BT").split
    'train'
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Annotated[
        str, AfterValidator(name_or_path(NEWS, PROBES)), Option("Text", "NAME", "--corpus")
    ] = Field(
        NEWS,
        description="dataset on the Hub; a file or folder, also at s3://, of .txt, .jsonl "
        "(.ndjson), .json, .csv or .parquet (.parq) files, all but the last also as .gz or "
        ".zst; news, the packaged articles, or probes, the packaged texts with labels (write "
        "./news for a folder of that name)",
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
        False, description="leave out documents whose text is exactly that of an earlier document"
    )


class LeftOut(NamedTuple):
    """A file or folder of a corpus that is not read."""

    name: str
    """Path, relative to the folder of the corpus."""
    why: str
    """The reason, as part of a sentence."""


class Document(NamedTuple):
    """One text and its origin."""

    id: str
    """The row's own id, else its number within its file or dataset, counted from 0."""
    source: str
    """The website for news, the path in the corpus' folder for files, the id for a dataset."""
    title: str | None
    """Title; None if the row has none."""
    url: str | None
    """Address of the text; None if the row has none."""
    text: str
    """The text itself, which may be white space only."""


class Corpus(ABC):
    """A restartable stream of documents in a fixed order. Made by `open_corpus`.

    Attributes:
        full_name: name by which the corpus is found from any folder.
        dedup: whether the reader must leave out repeated documents.
        n_bytes: bytes of the files as they are stored; None if unknown.
        left_out: the parts that are not read, each with the reason.
        cursor_names: names of the numbers in a cursor.
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
        """End every stream at its next document."""
        self._stopped = True

    def documents(self, cursor: Cursor | None = None) -> Iterator[Document]:
        """Yield every document with text, from the first or from a cursor."""
        return (document for document, _ in self.placed(cursor))

    def placed(self, cursor: Cursor | None = None) -> Iterator[tuple[Document, Cursor]]:
        """Yield every document with text, each with the cursor of the place after it.

        A cursor is valid for one fingerprint of the corpus. Raises InputError if the data cannot be
        read, if no document has text, or if the cursor belongs to another kind of corpus.
        """
        if cursor is not None and set(cursor) != set(self.cursor_names):
            raise InputError(
                f"The cursor ({', '.join(sorted(cursor)) or 'empty'}) does not belong to the "
                f"corpus {self.name}; the record that holds it is damaged: run "
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
        """Return the identity of the data: it changes when their names or bytes change."""

    @abstractmethod
    def require_unchanged(self) -> None:
        """Raise `InputError` if the data have changed since the last call of `fingerprint`."""

    @abstractmethod
    def _read(self, cursor: Cursor | None) -> Iterator[tuple[Document, Cursor]]:
        """Yield every document from a cursor on, also empty ones, and the cursor after each."""


def row_documents(
    rows: Iterable[tuple[str, Row, CursorT]],
    text_column: str | None,
    source: str,
    where: str,
    first: int = 0,
) -> Iterator[tuple[Document, CursorT]]:
    """Convert rows to documents; a row without text gives an empty document.

    A row comes with its name for messages and the place after it, which is passed on; `first` is
    the number of the first row. Columns are found again whenever the names change, because JSON
    lines may have different names.
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
    """Find the columns of text, id, title and url; case matters only for a given name."""
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
    """Return a document's text; bytes are decoded as UTF-8 (some Parquet writers store bytes)."""
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
    """Convert an id, a title or a URL to text."""
    if isinstance(value, bytes):
        return value.decode(errors="replace")
    try:
        return _well_formed(str(value))
    except (RecursionError, ValueError) as error:  # nested lists, or a number of 5,000 digits
        raise InputError(
            f"{where} cannot be written as text ({first_line(error)}); remove the column."
        ) from error


def _shown(name: str) -> str:
    """Shorten a column's name for a message."""
    name = name if len(name) <= SHOWN_CHARS else name[:SHOWN_CHARS] + "…"
    return name if name.isprintable() else ascii(name)[1:-1]


def _well_formed(text: str) -> str:
    """Replace lone surrogates by U+FFFD: JSON can hold them, UTF-8 cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return text
