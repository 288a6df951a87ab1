"""The order of an epoch's rows: a pure function of the rows per chunk, the seed and the epoch.

An epoch permutes all chunks. Consecutive chunks make a *window*, and the rows of a window are
permuted. Batch s of an epoch begins at row s * batch_rows of that order; rank r of w processes
takes the r-th of w equal parts of the batch. So the order does not depend on the number of
processes, on threads or on interruptions, and a position in it is one number.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from sae_harvest.common.errors import InputError
from sae_harvest.store.loading.permutation import permutation

Int64s = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class Window:
    """A window of an epoch. Its rows are numbered from 0 before they are permuted."""

    epoch: int
    """Number of the epoch, from 0."""
    number: int
    """Number of the window in its epoch, from 0."""
    chunks: Int64s
    """Numbers of the chunks in the order they are taken, int64 [n]."""
    edges: Int64s
    """Rows edges[i] .. edges[i + 1] belong to chunks[i]; int64 [n + 1]."""
    first: int
    """Position in the epoch's order at which the window begins."""


class Order:
    """The order of one rank's rows.

    Rows past the last whole batch of an epoch are dropped: they belong to no rank.

    Args:
        counts: rows to read from each chunk, int64 [chunks].
        seed: seed of the order.
        window_chunks: chunks per window.
        batch_rows: rows per batch, over all ranks.
        rank, world: number of this process, and number of processes.

    Raises:
        InputError: the batch is empty or cannot be divided equally.
    """

    def __init__(
        self,
        counts: Int64s,
        seed: int,
        window_chunks: int,
        batch_rows: int,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        if not 0 <= rank < world:
            raise InputError(f"There is no rank {rank} of {world}; ranks go from 0 to {world - 1}.")
        if batch_rows < 1 or batch_rows % world:
            raise InputError(
                f"A batch of {batch_rows:,} rows can't be divided among {world} processes; use a "
                f"multiple of {world}."
            )
        if window_chunks < 1:
            raise InputError(f"A window of {window_chunks} chunks holds nothing; use 1 or more.")
        self._counts, self._seed = counts, seed
        self._window_chunks, self._batch_rows, self._rank = window_chunks, batch_rows, rank
        self.share = batch_rows // world  # rows of a batch for this rank
        self.batches_per_epoch = int(counts.sum()) // batch_rows
        self.capacity = self._most()  # most rows of this rank in any window

    def windows(self, epoch: int, step: int) -> Iterator[tuple[Window, int]]:
        """Yield endlessly the windows with rows of this rank, from batch `step` of an epoch.

        Each comes with the number of this rank's rows in it that lie before that batch: 0 except in
        the first window.
        """
        begin = step * self._batch_rows
        while True:
            chunks = permutation(_generator(self._seed, epoch), len(self._counts))
            first = 0
            for number, low in enumerate(range(0, len(chunks), self._window_chunks)):
                taken = chunks[low : low + self._window_chunks]
                edges = np.concatenate([[0], np.cumsum(self._counts[taken])])
                window = Window(epoch, number, taken, edges, first)
                ours = self._ours(window)
                if len(ours) and (skipped := self._before(begin) - ours.start) < len(ours):
                    yield window, max(0, skipped)
                first += int(edges[-1])
            epoch, begin = epoch + 1, 0

    def count(self, window: Window) -> int:
        """Return the number of this rank's rows in a window."""
        return len(self._ours(window))

    def places(self, window: Window) -> Int64s:
        """Return the place of each row of a window among this rank's rows, int64 [rows].

        Rows are in the order of `window.edges`. Rows of other ranks have the place `capacity`.
        """
        rows = int(window.edges[-1])
        slots = permutation(_generator(self._seed, window.epoch, window.number), rows)
        ours = self._ours(window)
        batch, inside = np.divmod(np.arange(ours.start, ours.stop), self.share)
        positions = batch * self._batch_rows + self._rank * self.share + inside - window.first
        places = np.full(rows, self.capacity)
        places[slots[positions]] = np.arange(len(ours))
        return places

    def _ours(self, window: Window) -> range:
        """Return this rank's rows of an epoch that lie in a window."""
        return range(self._before(window.first), self._before(window.first + int(window.edges[-1])))

    def _before(self, position: int) -> int:
        """Return the number of this rank's rows before a position of an epoch."""
        batch, inside = divmod(position, self._batch_rows)
        if batch >= self.batches_per_epoch:
            return self.batches_per_epoch * self.share
        return batch * self.share + min(max(0, inside - self._rank * self.share), self.share)

    def _most(self) -> int:
        largest = np.sort(self._counts)[-self._window_chunks :]
        batches, rest = divmod(int(largest.sum()), self._batch_rows)
        return batches * self.share + min(rest, self.share)


def _generator(*key: int) -> np.random.Philox:
    return np.random.Philox(np.random.SeedSequence(key))
