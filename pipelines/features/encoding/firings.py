"""Firings on disk: (latent, row, value) of a block of rows, sorted by latent, in a Parquet file.

    FEATURES/firings/000000.parquet    rows [0, block_rows)
    FEATURES/firings/000001.parquet    the next rows, ...

Any worker encodes a block, once, and publishes it whole; an existing file is never replaced.
Everything else is counted from these files, latent by latent and block after block, so that results
do not depend on which worker encoded a block, or on interruptions.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from sae_harvest.common.errors import RunError
from sae_harvest.common.paths import exact_file
from sae_harvest.pipelines.features.counting import kernels
from sae_harvest.pipelines.features.tables.folder import with_version
from sae_harvest.store.objects import LocalObjects

FOLDER = "firings"
ROW_GROUP = 1 << 16  # least number of pairs that a read decodes
BLOCK_NUMBERS = 1 << 24  # most activations of a block if all latents fire
AT_ONCE = 1 << 23  # most firings of several blocks in memory; 8 bytes each
MAX_ROWS = 1 << 30  # most rows of those blocks
READS = 2  # reads in progress at once
COLUMNS = ("latent", "row", "value")


@dataclass(frozen=True, slots=True, eq=False)
class Firings:
    """The firings of one or several blocks, sorted by latent, then row."""

    first_row: int
    """First row of the first block."""
    first_latent: int
    """Latent with which `starts` begins."""
    starts: npt.NDArray[np.int64]
    """int64 [latents + 1], where each latent's pairs begin."""
    row: npt.NDArray[np.int32]
    """int32 [pairs], counted from `first_row`."""
    value: npt.NDArray[np.float32]
    """float32 [pairs], activations."""


def block_rows(shard_rows: int, context_length: int, pairs_per_row: int) -> int:
    """Choose the rows of a block: whole contexts, few enough for memory, whole blocks per shard."""
    contexts = shard_rows // context_length
    most = max(1, BLOCK_NUMBERS // (pairs_per_row * context_length))
    return context_length * max(
        n for n in range(1, contexts + 1) if n <= most and contexts % n == 0
    )


def block_key(block: int) -> str:
    return f"{FOLDER}/{block:06d}.parquet"


def publish(objects: LocalObjects, block: int, firings: Firings) -> None:
    """Write a block's file; if another worker has written it already, its file stays."""
    latents = np.arange(len(firings.starts) - 1, dtype=np.int32)
    table = pa.table(
        {
            "latent": np.repeat(latents, np.diff(firings.starts)),
            "row": firings.row + np.int64(firings.first_row),
            "value": firings.value,
        }
    )
    out = io.BytesIO()
    pq.write_table(
        with_version(table),
        out,
        row_group_size=ROW_GROUP,
        compression="none",  # saves little after these encodings, at five times their cost
        use_dictionary=["latent"],  # of runs
        column_encoding={
            "row": "DELTA_BINARY_PACKED",
            "value": "BYTE_STREAM_SPLIT",
        },
        write_page_checksum=True,
    )
    objects.publish(block_key(block), [out.getbuffer()])


@dataclass(frozen=True)
class Blocks:
    """The files of a finished encoding."""

    folder: Path
    """Folder of the tables."""
    n_rows: int
    """Rows of the store."""
    block_rows: int
    """Rows of each block but the last."""
    n_latents: int
    """Number of latents."""

    def __len__(self) -> int:
        return -(-self.n_rows // self.block_rows)

    def span(self, block: int) -> tuple[int, int]:
        """Return the first and last-plus-one row of a block."""
        first = block * self.block_rows
        return first, min(first + self.block_rows, self.n_rows)

    def missing(self) -> list[int]:
        """List the blocks that have no file yet."""
        folder = self.folder / FOLDER
        there = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
        return [b for b in range(len(self)) if Path(block_key(b)).name not in there]

    @property
    def n_pairs(self) -> int:
        """Count the firings in all blocks."""
        total = 0
        for block in range(len(self)):
            with self._open(block) as file:
                total += file.metadata.num_rows
        return total

    @contextmanager
    def _open(self, block: int) -> Iterator[pq.ParquetFile]:
        path = self.folder / block_key(block)
        try:
            with (
                exact_file(path) as opened,
                pq.ParquetFile(opened, page_checksum_verification=True) as file,
            ):
                yield file
        except (OSError, pa.ArrowException) as error:
            why = str(error).splitlines()[0]
            raise RunError(
                f"{path} is missing or damaged ({why}); delete it and build again: only missing "
                "files are made."
            ) from error

    def read(self, block: int, first: int = 0, last: int | None = None) -> Firings:
        """Read a block's firings of the latents [first, last).

        Raises:
            RunError: the file is missing or damaged; the message names it.
        """
        last = self.n_latents if last is None else last
        with self._open(block) as file:
            table = file.read_row_groups(
                _groups(file.metadata, first, last), columns=list(COLUMNS), use_threads=False
            )
        latent = table["latent"].to_numpy()
        inside = slice(*np.searchsorted(latent, [first, last]))
        starts = np.zeros(last - first + 1, np.int64)
        np.cumsum(np.bincount(latent[inside] - first, minlength=last - first), out=starts[1:])
        first_row = block * self.block_rows
        row = (table["row"].to_numpy()[inside] - first_row).astype(np.int32)
        return Firings(first_row, first, starts, row, table["value"].to_numpy()[inside])

    def all(self, first: int = 0, last: int | None = None) -> Iterator[tuple[slice, Firings]]:
        """Yield firings of the latents [first, last), from as many blocks as fit into memory.

        The blocks come in order, each time with the slice of their rows.
        """
        parts: list[Firings] = []
        begin, pairs = 0, 0
        for block, part in enumerate(self._side_by_side(first, last)):
            end = self.span(block)[1]
            pairs += len(part.row)
            if parts and (pairs > AT_ONCE or end - begin > MAX_ROWS):
                yield slice(begin, part.first_row), _joined(parts)
                parts, begin, pairs = [], part.first_row, len(part.row)
            parts.append(part)
        if parts:
            yield slice(begin, self.n_rows), _joined(parts)

    def _side_by_side(self, first: int, last: int | None) -> Iterator[Firings]:
        """Yield the firings of all blocks in order, reading a few blocks at the same time."""
        with ThreadPoolExecutor(READS) as pool:
            for block in range(0, len(self), READS):
                some = range(block, min(block + READS, len(self)))
                yield from pool.map(lambda b: self.read(b, first, last), some)


def _joined(parts: list[Firings]) -> Firings:
    """Join the firings of consecutive blocks, for the same latents."""
    if len(parts) == 1:
        return parts[0]
    starts = np.sum([part.starts for part in parts], axis=0)
    row, value = np.empty(starts[-1], np.int32), np.empty(starts[-1], np.float32)
    ends, begin = starts[:-1].copy(), parts[0].first_row
    for part in parts:
        given = part.starts, part.row, part.value, part.first_row - begin
        kernels.append_firings(*given, ends, row, value)
    return Firings(begin, parts[0].first_latent, starts, row, value)


def _groups(metadata: pq.FileMetaData, first: int, last: int) -> list[int]:
    """List the row groups that may hold the latents, by their statistics."""
    found = []
    for group in range(metadata.num_row_groups):
        statistics = metadata.row_group(group).column(0).statistics
        if statistics and statistics.max >= first and statistics.min < last:
            found.append(group)
    return found
