"""Firings and activations of examples: those of a row, or pooled over the rows of a document.

last      the value on the document's last token
mean      the mean over the document's tokens, zeros included
maximum   the largest value
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from sae_harvest.common.cache import use_numba_cache
from sae_harvest.pipelines.evaluate.probing.examples import ROWS, Examples
from sae_harvest.pipelines.features.encoding.firings import Blocks
from sae_harvest.store.reader import ActivationStore

use_numba_cache()

from numba import njit, prange  # noqa: E402

Pooling = Literal["last", "mean", "maximum"]
POOLINGS: tuple[Pooling, ...] = ("last", "mean", "maximum")
PAIRS = 1 << 20  # firings of whole latents that are read at once


class Pairs(NamedTuple):
    """Values of some latents that are not 0."""

    first: int
    """The first latent."""
    starts: npt.NDArray[np.int64]
    """int64 [latents + 1], where each latent's pairs begin."""
    example: npt.NDArray[np.int32]
    """int32 [pairs], ascending for each latent."""
    value: npt.NDArray[np.float32]
    """float32 [pairs]."""


@dataclass(frozen=True)
class StoredFirings:
    """Firings on disk, of the first rows of a store."""

    blocks: Blocks
    """The files."""
    n_fire: npt.NDArray[np.int64]
    """Number of firings of each latent, or more [n_latents]."""

    @property
    def n_latents(self) -> int:
        """Return the number of latents."""
        return self.blocks.n_latents

    def pairs(self, examples: Examples, pooling: Pooling) -> Iterator[Pairs]:
        """Yield the values of all latents on the examples, some latents at a time.

        Raises:
            RunError: a file is missing or damaged.
        """
        first = 0
        while first < self.n_latents:
            sums = self.n_fire[first:].cumsum()
            last = first + max(1, int(np.searchsorted(sums, PAIRS, "right")))
            starts, row, value = self._read(first, last)
            if examples.unit == ROWS:
                yield Pairs(first, starts, row, value)
            else:
                of = examples.of_row, examples.n_rows, examples.last_row
                yield Pairs(first, *_pooled(starts, row, value, *of, POOLINGS.index(pooling)))
            first = last

    def _read(
        self, first: int, last: int
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int32], npt.NDArray[np.float32]]:
        """Read the firings of the latents [first, last): starts, rows, values."""
        parts = [part for _, part in self.blocks.all(first, last)]
        if len(parts) == 1:
            return parts[0].starts, parts[0].row, parts[0].value
        # one latent with very many firings, or counts that are too small
        latent = np.concatenate(
            [np.repeat(np.arange(last - first), np.diff(p.starts)) for p in parts]
        )
        order = np.argsort(latent, kind="stable")
        row = np.concatenate([p.row + np.int32(p.first_row) for p in parts])[order]
        starts = np.sum([part.starts for part in parts], axis=0)
        return starts, row, np.concatenate([p.value for p in parts])[order]


@dataclass(frozen=True)
class DenseColumns:
    """Columns of a matrix in the place of latents: channels, or principal components."""

    x: npt.NDArray[np.float32]
    """float32 [examples, columns]."""

    @property
    def n_latents(self) -> int:
        """Return the number of columns."""
        return self.x.shape[1]

    def pairs(self, examples: Examples, pooling: Pooling) -> Iterator[Pairs]:
        """Yield all values, some columns at a time; `x` is pooled already."""
        n, columns = self.x.shape
        step = max(1, PAIRS // max(1, n))
        every = np.arange(n, dtype=np.int32)
        for first in range(0, columns, step):
            here = np.ascontiguousarray(self.x[:, first : first + step].T)
            starts = np.arange(len(here) + 1, dtype=np.int64) * n
            yield Pairs(first, starts, np.tile(every, len(here)), here.ravel())


def _pooled(
    starts: npt.NDArray[np.int64],
    row: npt.NDArray[np.int32],
    value: npt.NDArray[np.float32],
    of_row: npt.NDArray[np.int32],
    n_rows: npt.NDArray[np.int64],
    last_row: npt.NDArray[np.int64],
    pooling: int,
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int32], npt.NDArray[np.float32]]:
    """Pool the firings of each latent over the rows of each example."""
    example, pooled = np.empty(len(row), np.int32), np.empty(len(row), np.float32)
    counts = np.zeros(len(starts) - 1, np.int64)
    _pool(starts, row, value, of_row, n_rows, last_row, pooling, example, pooled, counts)
    kept = np.arange(len(row)) - np.repeat(starts[:-1], np.diff(starts)) < np.repeat(
        counts, np.diff(starts)
    )
    return np.concatenate([[0], counts.cumsum()]), example[kept], pooled[kept]


@njit(parallel=True, nogil=True, cache=True)
def _pool(
    starts: npt.NDArray[np.int64],
    row: npt.NDArray[np.int32],
    value: npt.NDArray[np.float32],
    of_row: npt.NDArray[np.int32],
    n_rows: npt.NDArray[np.int64],
    last_row: npt.NDArray[np.int64],
    pooling: int,
    example: npt.NDArray[np.int32],
    pooled: npt.NDArray[np.float32],
    counts: npt.NDArray[np.int64],
) -> None:
    """Write the pooled pairs of a latent at the place of its firings, and their number."""
    for i in prange(len(starts) - 1):
        first, last = starts[i], starts[i + 1]
        of = np.empty(last - first, np.int32)
        for p in range(first, last):
            of[p - first] = of_row[row[p]]
        order = np.argsort(of, kind="mergesort")
        out, j = first, 0
        while j < len(order):
            e = of[order[j]]
            result = 0.0
            while j < len(order) and of[order[j]] == e:
                p = first + order[j]
                if pooling == 0:
                    if e >= 0 and row[p] == last_row[e]:
                        result = value[p]
                elif pooling == 1:
                    result += value[p]
                else:
                    result = max(result, value[p])
                j += 1
            if e >= 0 and result != 0:
                example[out] = e
                pooled[out] = result / n_rows[e] if pooling == 1 else result
                out += 1
        counts[i] = out - first


def pooled_channels(
    store: ActivationStore, site: str, examples: Examples, pooling: Pooling
) -> npt.NDArray[np.float32]:
    """Pool the activations of a site over the rows of each document, float32 [examples, width].

    Raises:
        DamagedError: an object of the store is missing or damaged.
    """
    n, width = len(examples), store.width(site)
    found = np.zeros((n, width), np.float64 if pooling == "mean" else np.float32)
    if pooling == "maximum":
        found[:] = -np.inf
    step = store.chunk_rows(site)
    for first in range(0, len(examples.of_row), step):
        last = min(first + step, len(examples.of_row))
        of = examples.of_row[first:last]
        rows = np.flatnonzero(of >= 0)
        if pooling == "last":
            rows = rows[examples.last_row[of[rows]] == rows + first]
        if len(rows) == 0:
            continue
        x = store.read(site, first, last)[rows].astype(np.float32)
        begins = np.flatnonzero(np.diff(of[rows], prepend=-1))  # runs of one example
        at = of[rows][begins]
        if pooling == "mean":
            np.add.at(found, at, np.add.reduceat(x, begins, axis=0, dtype=np.float64))
        elif pooling == "maximum":
            np.maximum.at(found, at, np.maximum.reduceat(x, begins, axis=0))
        else:
            found[at] = x[begins]
    if pooling == "mean":
        found /= examples.n_rows[:, None]
    return found.astype(np.float32)


def row_channels(
    store: ActivationStore, site: str, rows: npt.NDArray[np.int64]
) -> npt.NDArray[np.float32]:
    """Read the activations of rows in ascending order, float32 [rows, width]."""
    found = np.empty((len(rows), store.width(site)), np.float32)
    step = store.chunk_rows(site)
    chunks = rows // step
    for chunk in np.unique(chunks).tolist():
        here = slice(*np.searchsorted(chunks, [chunk, chunk + 1]))
        first = chunk * step
        x = store.read(site, first, min(first + step, store.n_rows))
        found[here] = x[rows[here] - first]
    return found
