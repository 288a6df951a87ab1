"""Shuffled batches from a store, in an order that depends on nothing but (store, seed, epoch).

An epoch permutes all chunks of a site; a *window* of chunks is resident, and the selected rows
inside it are permuted. Batch number s of an epoch is rows s * batch_rows .. of that one order,
so a position is a number and resuming reads at most one window again.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass
from queue import Empty, Full, Queue
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from store.errors import DamagedError, InputError, RunError
from store.reader import ActivationStore
from store.rules import RowRule

STATE_VERSION = 1


@dataclass(frozen=True, slots=True)
class Batch:
    """rows int64 [batch_rows], row numbers; x torch.float32 [batch_rows, d_in]."""

    rows: npt.NDArray[np.int64]
    x: torch.Tensor


@dataclass(frozen=True, slots=True)
class _Window:
    rows: npt.NDArray[np.int64]  # row numbers, already permuted
    slots: npt.NDArray[np.int64]  # where each of them lies in x
    x: npt.NDArray[Any]  # [resident rows, d_in], stored dtype, in the order they were read


class ShuffledLoader:
    """Endless shuffled batches, epoch after epoch; each selected row at most once an epoch.

    The last `n_selected % batch_rows` rows of an epoch's order are dropped; the next epoch has
    another order. One thread reads the next window while this one is consumed, so that memory
    is two windows, fixed at the start.

    Args:
        store: a sealed store.
        site: which activations.
        batch_rows: rows per batch.
        seed: of the order.
        rule: which rows.
        window_chunks: chunks resident at a time; more mixes better and costs memory.
    """

    def __init__(
        self,
        store: ActivationStore,
        site: str,
        batch_rows: int,
        seed: int = 0,
        rule: RowRule | None = None,
        window_chunks: int = 64,
    ) -> None:
        self._store, self._site = store, store.site(site)
        self._batch_rows, self._seed = batch_rows, seed
        self._window_chunks = window_chunks
        self._chunk_rows = store.chunk_rows(site)
        selected = store.selected(site, rule or RowRule())
        edges = np.arange(0, store.n_rows, self._chunk_rows)
        self._counts = np.add.reduceat(selected, edges, dtype=np.int64)  # [chunks]
        self._mask = np.packbits(selected)  # one bit a row stays in memory
        self.n_selected = int(self._counts.sum())
        self.batches_per_epoch = self.n_selected // batch_rows
        if self.batches_per_epoch == 0:
            raise InputError(
                f"{store.place} has {self.n_selected:,} rows to read, fewer than one batch of "
                f"{batch_rows:,}; harvest more tokens or use smaller batches."
            )
        self._epoch = self._step = 0
        self._reader: _ReadAhead | None = None

    def state(self) -> dict[str, Any]:
        """Where the consumer is: after the last batch it was given. JSON-able, five values."""
        return {
            "version": STATE_VERSION,
            "store_digest": self._store.digest,
            "seed": self._seed,
            "epoch": self._epoch,
            "step": self._step,
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Continue where `state` was taken. `RunError` if it belongs to another order."""
        mine = self.state()
        for field in ("version", "store_digest", "seed"):
            if state.get(field) != mine[field]:
                raise RunError(
                    f"The loader state has {field} {state.get(field)!r}, this run has "
                    f"{mine[field]!r}; continue with the store and seed it was saved from."
                )
        self.close()
        self._epoch, self._step = int(state["epoch"]), int(state["step"])

    def __iter__(self) -> Iterator[Batch]:
        while True:
            yield self.next_batch()

    def next_batch(self) -> Batch:
        """The next batch; its tensor is the caller's own."""
        if self._reader is None:
            self._reader = _ReadAhead(self._windows_from(self._epoch, self._step))
        if self._step == self.batches_per_epoch:
            self._epoch, self._step = self._epoch + 1, 0
        need = self._batch_rows
        rows = np.empty(need, np.int64)
        x = torch.empty(need, self._store.width(self._site))  # [batch_rows, d_in]
        filled = 0
        while filled < need:
            window, offset = self._reader.current()
            take = min(need - filled, len(window.rows) - offset)
            chosen = slice(offset, offset + take)
            rows[filled : filled + take] = window.rows[chosen]
            slots = torch.from_numpy(window.slots[chosen])
            x[filled : filled + take] = torch.from_numpy(window.x)[slots]
            self._reader.advance(take)
            filled += take
        if not torch.isfinite(x.sum()):
            bad = rows[~torch.isfinite(x).all(1).numpy()]
            raise DamagedError(
                f"{self._store.place} holds values of {self._site} that are not finite, in row "
                f"{bad.min()}; run `harvest verify`."
            )
        self._step += 1
        if self._step == self.batches_per_epoch:
            self._reader.skip_tail()
        return Batch(rows, x)

    def close(self) -> None:
        """Stop the reading thread. The loader can be used again."""
        if self._reader is not None:
            self._reader.close()
            self._reader = None

    def _windows_from(self, epoch: int, step: int) -> Iterator[tuple[_Window, int, bool]]:
        """Windows with the offset to start at and whether the epoch ends with it."""
        if step == self.batches_per_epoch:
            epoch, step = epoch + 1, 0
        skip = step * self._batch_rows
        while True:
            order = _generator(self._seed, epoch).permutation(len(self._counts))
            for number, first in enumerate(range(0, len(order), self._window_chunks)):
                chunks = order[first : first + self._window_chunks]
                count = int(self._counts[chunks].sum())
                last = first + self._window_chunks >= len(order)
                if skip >= count and not last:
                    skip -= count
                    continue
                yield self._read_window(epoch, number, chunks), skip, last
                skip = 0
            epoch, skip = epoch + 1, 0

    def _read_window(self, epoch: int, number: int, chunks: npt.NDArray[np.int64]) -> _Window:
        count = int(self._counts[chunks].sum())
        rows = np.empty(count, np.int64)
        x = np.empty((count, self._store.width(self._site)), self._store.dtype)
        filled = 0
        for chunk in chunks.tolist():
            start = chunk * self._chunk_rows
            stop = min(start + self._chunk_rows, self._store.n_rows)
            bits = np.unpackbits(self._mask[start // 8 : -(-stop // 8)])
            keep = np.flatnonzero(bits[start % 8 :][: stop - start])
            into = slice(filled, filled + len(keep))
            rows[into] = start + keep
            np.take(self._store.read(self._site, start, stop), keep, axis=0, out=x[into])
            filled += len(keep)
        slots = _generator(self._seed, epoch, number).permutation(len(rows))
        return _Window(rows[slots], slots, x)


class _ReadAhead:
    """Windows read by a thread, one ahead, handed over in order."""

    def __init__(self, windows: Iterator[tuple[_Window, int, bool]]) -> None:
        self._windows = windows
        self._queue: Queue[tuple[_Window, int, bool] | BaseException] = Queue(maxsize=1)
        self._stop = threading.Event()
        self._window: tuple[_Window, bool] | None = None
        self._offset = 0
        self._thread = threading.Thread(target=self._run, name="store-loader", daemon=True)
        self._thread.start()

    def current(self) -> tuple[_Window, int]:
        while self._window is None or self._offset == len(self._window[0].rows):
            self._next()
        return self._window[0], self._offset

    def advance(self, rows: int) -> None:
        self._offset += rows

    def skip_tail(self) -> None:
        """Drop what is left of the epoch, that is up to the end of its last window."""
        while self._window is None or not self._window[1]:
            self._next()
        self._window = None

    def close(self) -> None:
        self._stop.set()
        while self._thread.is_alive():
            try:
                self._queue.get_nowait()
            except Empty:
                self._thread.join(0.05)

    def _next(self) -> None:
        item = self._queue.get()
        if isinstance(item, BaseException):
            raise item
        window, self._offset, last = item
        self._window = window, last

    def _run(self) -> None:
        try:
            for item in self._windows:
                if not self._put(item):
                    return
        except BaseException as error:  # handed to the consumer, who raises it
            self._put(error)

    def _put(self, item: tuple[_Window, int, bool] | BaseException) -> bool:
        while not self._stop.is_set():
            try:
                self._queue.put(item, timeout=0.1)
                return True
            except Full:
                continue
        return False


def _generator(*key: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(key)))
