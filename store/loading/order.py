"""The order of an epoch's rows: a pure function of how many rows each chunk has, seed and epoch.

An epoch permutes all chunks. Consecutive ones make a *window*, and the rows of a window are
permuted. Batch number s of an epoch is rows s * batch_rows .. of that one order, and of those,
rank r of a world of w processes has the r-th of w equal parts. So the order does not depend on the
world, on threads or on where a run was interrupted, and a position in it is a number.
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
    """The `number`-th window of an epoch. Its rows, before they are permuted, are numbered.

    chunks: int64 [n], in the order they are taken.
    edges: int64 [n + 1], rows edges[i] .. edges[i + 1] are those of chunks[i].
    first: position in the epoch's order at which the window begins.
    """

    epoch: int
    number: int
    chunks: Int64s
    edges: Int64s
    first: int


class Order:
    """The order of one rank's rows.

    Rows past the last whole batch of an epoch are dropped: they belong to no rank.

    Args:
        counts: int64 [chunks], rows to read of each.
        seed: of the order.
        window_chunks: chunks of a window.
        batch_rows: rows of a batch, over all ranks.
        rank, world: which part of each batch is ours.

    Raises:
        InputError: the batch can't be divided, or there is none.
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
            raise InputError(f"Rank {rank} is none of {world}; ranks go from 0 to {world - 1}.")
        if batch_rows < 1 or batch_rows % world:
            raise InputError(
                f"A batch of {batch_rows:,} rows can't be divided among {world} processes; use a "
                f"multiple of {world}."
            )
        if window_chunks < 1:
            raise InputError(f"A window of {window_chunks} chunks holds nothing; use 1 or more.")
        self._counts, self._seed = counts, seed
        self._window_chunks, self._batch_rows, self._rank = window_chunks, batch_rows, rank
        self.share = batch_rows // world  # rows of a batch that are ours
        self.batches_per_epoch = int(counts.sum()) // batch_rows
        self.capacity = self._most()  # of our rows in any window

    def windows(self, epoch: int, step: int) -> Iterator[tuple[Window, int]]:
        """Yield the windows from batch `step` of an epoch on, without end, in which we have rows.

        With each comes how many of our rows in it lie before that batch, 0 in all but the first.
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
        """The place of each row of a window among this rank's rows; `capacity` for others' rows.

        The rows are given chunk after chunk, as `window.edges` numbers them.
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
        """Return the part of this rank's rows of the epoch that a window holds."""
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
