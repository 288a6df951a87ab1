"""Firings of two dictionaries on the same rows, in spans of rows that fit into memory.

The files of the two sides may begin at other rows. A span begins where a file of the first side
does, at the beginning of a context; the second side's files are cut to it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from sae_harvest.common.errors import RunError
from sae_harvest.common.paths import exact_file
from sae_harvest.pipelines.evaluate.matching.common import CommonRows
from sae_harvest.pipelines.features.encoding.firings import Firings
from sae_harvest.pipelines.features.tables.checks import check_columns, require_whole
from sae_harvest.pipelines.features.tables.folder import FIRINGS, firing_files

SPAN_FIRINGS = (
    1 << 23
)  # about the firings of a side in memory; 8 bytes each, 16 while they are read


@dataclass(frozen=True, eq=False)
class Span:
    """Firings on the rows [first, last) that both sides read."""

    first: int
    last: int

    a: Firings
    b: Firings

    n_common: int
    """Number of rows that both sides read."""


@dataclass(frozen=True)
class _File:
    path: Path
    low: int
    """Lowest row with a firing."""
    high: int
    """Highest row with a firing."""
    n: int
    """Number of firings."""


class Spans:
    """The common rows of two sides, in spans; every iteration reads the files again."""

    def __init__(self, rows: CommonRows) -> None:
        """Look at the files of both sides.

        Raises:
            RunError: a file is missing or damaged.
        """
        self.rows = rows
        self._a, self._b = (_files(side.features) for side in (rows.a, rows.b))
        self._edges = self._cut(rows)

    def __len__(self) -> int:
        return len(self._edges) - 1

    def _cut(self, rows: CommonRows) -> list[int]:
        edges, waiting = [0], 0
        for file in self._a:
            begin = file.low // rows.context_length * rows.context_length
            if waiting and waiting + file.n > SPAN_FIRINGS and edges[-1] < begin < rows.n_rows:
                edges.append(begin)
                waiting = 0
            waiting += file.n
        return [*edges, rows.n_rows]

    def __iter__(self) -> Iterator[Span]:
        a, b = self.rows.a, self.rows.b
        for first, last in zip(self._edges[:-1], self._edges[1:], strict=True):
            common = self.rows.mask(first, last)
            yield Span(
                first,
                last,
                _firings(self._a, a.n_latents, first, common),
                _firings(self._b, b.n_latents, first, common),
                int(common.sum()),
            )


def _files(features: Path) -> list[_File]:
    found = []
    for path in firing_files(features):
        check_columns(path, FIRINGS)
        with exact_file(path) as opened, pq.ParquetFile(opened) as file:
            place = file.schema_arrow.get_field_index("row")
            groups = [file.metadata.row_group(g) for g in range(file.metadata.num_row_groups)]
            limits = [group.column(place).statistics for group in groups if group.num_rows]
            n = file.metadata.num_rows
        if not n:
            continue
        if not all(limit is not None and limit.has_min_max for limit in limits):
            raise RunError(f"{path} lacks statistics of its rows; build the tables again.")
        low, high = min(limit.min for limit in limits), max(limit.max for limit in limits)
        found.append(_File(path, low, high, n))
    return sorted(found, key=lambda file: file.low)


def _firings(
    files: list[_File], n_latents: int, first: int, common: npt.NDArray[np.bool_]
) -> Firings:
    """Read the firings on the common rows of a span, sorted by latent, then row."""
    latents, rows = [np.empty(0, np.int32)], [np.empty(0, np.int32)]
    values = [np.empty(0, np.float32)]
    for file in files:
        if file.high < first or file.low >= first + len(common):
            continue
        table = _read(file.path)
        latent, row, value = (table[name].to_numpy() for name in ("latent", "row", "value"))
        if not (0 <= latent.min() <= latent.max() < n_latents):
            raise RunError(f"{file.path} is damaged (it has other latents); build again.")
        inside = (row >= first) & (row < first + len(common))
        inside[inside] = common[row[inside] - first]
        latents.append(latent[inside])
        rows.append((row[inside] - first).astype(np.int32))
        values.append(value[inside])
    latent, row, value = np.concatenate(latents), np.concatenate(rows), np.concatenate(values)
    if (np.diff(latent) < 0).any():  # of several files, each sorted by latent, then row
        order = np.argsort(latent, kind="stable")
        row, value = row[order], value[order]
    starts = np.zeros(n_latents + 1, np.int64)
    np.cumsum(np.bincount(latent, minlength=n_latents), out=starts[1:])
    return Firings(first, 0, starts, row, value)


def _read(path: Path) -> pa.Table:
    try:
        with (
            exact_file(path) as opened,
            pq.ParquetFile(opened, page_checksum_verification=True) as file,
        ):
            table = file.read(columns=["latent", "row", "value"])
    except (OSError, pa.ArrowException) as error:
        raise RunError(
            f"{path} is missing or damaged ({str(error).splitlines()[0]}); build the tables again."
        ) from error
    require_whole(path, table)
    return table
