"""Windows read ahead by a few threads, into two buffers that are used in turn."""

from __future__ import annotations

from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from queue import SimpleQueue

import numpy as np
import numpy.typing as npt

from sae_harvest.store.loading.chunks import READS, RowBuffer, SelectedRows
from sae_harvest.store.loading.order import Order, Window
from sae_harvest.store.reader import Scratch

BUFFERS = 2  # windows in memory: one being consumed, one being read


@dataclass(slots=True, eq=False)
class _Filling:
    """A window that is being read into a buffer."""

    buffer: RowBuffer
    """Buffer that receives the window's rows."""
    reads: list[Future[None]]
    """One read per chunk."""
    offset: int
    """Rows consumed so far."""
    count: int
    """Rows of this rank in the window."""


class ReadAhead:
    """One rank's rows without end, from a given batch of an epoch.

    A window is read as soon as a buffer is free. An error in a thread is raised when the consumer
    reaches that window, and again at each later call. The constructor takes memory; `close` frees
    it.
    """

    def __init__(self, selected: SelectedRows, order: Order, epoch: int, step: int) -> None:
        self._selected, self._order = selected, order
        self._pool = ThreadPoolExecutor(READS, "store-loader")
        self._scratch: SimpleQueue[Scratch] = SimpleQueue()
        for _ in range(READS):
            self._scratch.put(Scratch())
        self._windows = order.windows(epoch, step)
        self._filling: deque[_Filling] = deque()
        self._next = self._prepare()
        for _ in range(BUFFERS):
            self._fill(selected.buffer(order.capacity))

    def take(self, rows: int) -> tuple[RowBuffer, slice]:
        """Return the place of the next rows, at most `rows` of them.

        It is valid until the next call.
        """
        if self._filling[0].offset == self._filling[0].count:
            self._fill(self._filling.popleft().buffer)
        filling = self._filling[0]
        for read in filling.reads:
            read.result()
        first = filling.offset
        filling.offset = min(first + rows, filling.count)
        return filling.buffer, slice(first, filling.offset)

    def ready(self, rows: int) -> bool:
        """Whether `rows` rows can be taken without waiting and without an error."""
        for filling in self._filling:
            if rows > 0 and not all(r.done() and r.exception() is None for r in filling.reads):
                return False
            rows -= filling.count - filling.offset
        return rows <= 0

    def close(self) -> None:
        """Stop the threads, after the reads that have begun."""
        self._pool.shutdown(cancel_futures=True)
        self._filling.clear()

    def _prepare(self) -> tuple[Window, int, Future[npt.NDArray[np.int64]]]:
        """Return the next window without a buffer; a thread computes its places."""
        window, offset = next(self._windows)
        return window, offset, self._pool.submit(self._order.places, window)

    def _fill(self, buffer: RowBuffer) -> None:
        window, offset, places = self._next
        reads = [
            self._pool.submit(self._read, window, index, places, buffer)
            for index in range(len(window.chunks))
        ]
        self._filling.append(_Filling(buffer, reads, offset, self._order.count(window)))
        self._next = self._prepare()

    def _read(
        self,
        window: Window,
        index: int,
        places: Future[npt.NDArray[np.int64]],
        buffer: RowBuffer,
    ) -> None:
        low, high = window.edges[index : index + 2]
        scratch = self._scratch.get()
        try:
            # The places were submitted before the reads, so a thread has computed or is computing
            # them.
            chunk = int(window.chunks[index])
            self._selected.read(chunk, places.result()[low:high], buffer, scratch)
        finally:
            self._scratch.put(scratch)
