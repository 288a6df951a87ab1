"""Documents of a Hugging Face dataset, streamed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from sae_harvest.common.errors import InputError
from sae_harvest.harvest.text.documents import (
    Corpus,
    CorpusSpec,
    Cursor,
    Document,
    Row,
    row_documents,
)

if TYPE_CHECKING:
    import datasets


class HubCorpus(Corpus):
    """A split of a Hugging Face dataset, streamed at the commit that was found on opening.

    A cursor holds the number of rows done, the number of the present file of the dataset, and the
    rows of that file that are done. Earlier files are not read again. In the present file, the rows
    before the place are read and skipped, because `datasets` cannot seek.
    """

    cursor_names = ("rows", "file", "row")

    def __init__(self, spec: CorpusSpec) -> None:
        super().__init__(spec)
        import datasets  # takes a second to import, needed by Hub datasets only

        try:
            # Same as load_dataset(streaming=True), but keeps the builder, which knows the commit.
            self._builder = datasets.load_dataset_builder(
                spec.name, spec.config, revision=spec.revision
            )
        except Exception as error:
            raise self._cannot_open(error) from error
        self._stream()

    def fingerprint(self) -> str:
        config, split = self._builder.config.name, self._spec.split
        return f"{self.name}@{self._builder.hash}:{config}:{split}"

    def require_unchanged(self) -> None:
        """Do nothing: a commit of the Hub does not change."""

    def _read(self, cursor: Cursor | None) -> Iterator[tuple[Document, Cursor]]:
        where = f"the dataset {self.name}"
        first = cursor["rows"] if cursor else 0
        rows = self._rows(cursor)
        return row_documents(rows, self._spec.text_column, self.name, where, first)

    def _rows(self, cursor: Cursor | None) -> Iterator[tuple[str, Row, Cursor]]:
        stream = self._stream()
        number, first, row_in_file = 0, 0, 0
        if cursor:
            number, first, row_in_file = cursor["rows"], cursor["file"], cursor["row"]
        try:
            for file in range(first, stream.num_shards):
                part = stream.shard(stream.num_shards, file)
                for row in part.skip(row_in_file) if row_in_file else part:
                    number, row_in_file = number + 1, row_in_file + 1
                    after = {"rows": number, "file": file, "row": row_in_file}
                    yield f"row {number - 1}", row, after
                row_in_file = 0
        except Exception as error:  # `datasets` may raise anything
            raise InputError(
                f"Reading the dataset {self.name} failed after {number} rows ({_reason(error)}); "
                "run the same command again, or choose another --corpus."
            ) from error

    def _stream(self) -> datasets.IterableDataset:
        try:
            return self._builder.as_streaming_dataset(split=self._spec.split)
        except Exception as error:
            raise self._cannot_open(error) from error

    def _cannot_open(self, error: Exception) -> InputError:
        """Make one sentence for an error; the Hub and its network client may raise anything."""
        if isinstance(error, ConnectionError):
            return InputError(
                f"The Hugging Face hub cannot be reached for the dataset {self.name}, and no file "
                "or folder has that name; connect to the network, check the path, or use "
                "--corpus news."
            )
        return InputError(
            f"The dataset {self.name} cannot be opened ({_reason(error)}); check its id, "
            "configuration, split and revision, and that you have access."
        )


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
