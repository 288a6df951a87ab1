"""Shuffled batches from a store, in an order that depends only on store, rule, seed and epoch.

    order      the order of rows, as arithmetic
    chunks     rows that a rule selects; reading a chunk, checking it, placing its rows
    readahead  two windows in memory, four concurrent reads
    upload     pinned memory and a CUDA stream

docs/loader.md describes the guarantees, their cost, and how well the order mixes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from sae_harvest.common.errors import InputError, RunError
from sae_harvest.store.loading.chunks import SelectedRows
from sae_harvest.store.loading.order import Order
from sae_harvest.store.loading.readahead import ReadAhead
from sae_harvest.store.loading.recycling import Recycled
from sae_harvest.store.loading.upload import Sent, Upload
from sae_harvest.store.reader import ActivationStore
from sae_harvest.store.rules import RowRule

STATE_VERSION = 2
SMALL_NUMBERS = 32_767  # torch copies this many numbers in one thread
WINDOW_ROWS = 1 << 18  # default size of a window, for any width: see docs/loader.md


@dataclass(frozen=True, slots=True)
class Batch:
    """One rank's part of a batch."""

    rows: npt.NDArray[np.int64]
    """Row numbers in the store, int64 [batch_rows / world]."""
    x: torch.Tensor
    """Activations of these rows, float32 [batch_rows / world, d_in], on the loader's device."""
    target: torch.Tensor | None = None
    """Activations of these rows at the target site, float32 [batch_rows / world, d_out]."""


class ShuffledLoader:
    """Endless shuffled batches with their row numbers. The stream can be resumed.

    Each selected row comes at most once per epoch: the last `n_selected % batch_rows` rows of an
    epoch's order are dropped, and the next epoch has another order. Four threads read the next
    window while the current one is consumed, so memory is two windows, allocated at the first
    batch. A rank keeps only its own rows of a window. `ActivationDataset` is the simpler choice if
    neither row numbers nor resuming is needed.

    >>> store = open_store("runs/demo/store")
    >>> loader = ShuffledLoader(store, store.sites[0], batch_rows=256, seed=1)
    >>> batch = next(iter(loader))
    >>> batch.x.dtype, batch.x.shape == (256, store.width(store.sites[0])), batch.rows.shape
    (torch.float32, True, (256,))
    >>> loader.load_state(loader.state())  # continues with the batch after this one
    >>> loader.close()

    Args:
        store: a sealed store.
        site: the site to read, such as "resid_post.12".
        batch_rows: rows per batch, over all ranks.
        seed: seed of the order.
        rule: the rule that selects rows; None for the rows that training reads by default.
        window_chunks: chunks in memory at a time; more mix better and need more memory. None for
            enough to hold `WINDOW_ROWS` rows.
        target_site: a second site; its activations of the same rows are `Batch.target`. The rule
            must select a row at both sites.
        rank: number of this process, from 0.
        world: number of processes; each gets an equal part of every batch.
        device: device of the batches, "cpu" or "cuda".

    Raises:
        InputError: there is no such site, there are fewer rows than one batch, or a batch cannot
            be shared equally.
    """

    def __init__(
        self,
        store: ActivationStore,
        site: str,
        batch_rows: int,
        seed: int = 0,
        rule: RowRule | None = None,
        window_chunks: int | None = None,
        *,
        target_site: str | None = None,
        rank: int = 0,
        world: int = 1,
        device: str | torch.device = "cpu",
    ) -> None:
        self._store = store
        self._device = torch.device(device)
        sites = (site,) if target_site is None else (site, target_site)
        self._widths = [store.width(name) for name in sites]
        if window_chunks is None:
            window_chunks = -(-WINDOW_ROWS // store.chunk_rows(site))
        rule = rule or RowRule()
        self._selected = SelectedRows(store, sites, rule)
        self._order = Order(self._selected.counts, seed, window_chunks, batch_rows, rank, world)
        self.n_selected = int(self._selected.counts.sum())
        self.batches_per_epoch = self._order.batches_per_epoch
        if self.batches_per_epoch == 0:
            raise InputError(_too_few(store, rule, self.n_selected, batch_rows))
        # all that the order depends on
        self._identity = {
            "version": STATE_VERSION,
            "store_digest": store.digest,
            "site": site,
            "target_site": target_site,
            "rule": rule.model_dump(mode="json"),
            "batch_rows": batch_rows,
            "window_chunks": window_chunks,
            "seed": seed,
        }
        self._epoch = self._step = 0
        self._memory = [Recycled((self._order.share, width)) for width in self._widths]
        self._reading: ReadAhead | None = None
        self._upload: Upload | None = None
        self._sent: tuple[npt.NDArray[np.int64], Sent] | None = None  # the batch after this one

    def state(self) -> dict[str, Any]:
        """Return the position after the last batch, and the identity of the order, as JSON values.

        The state is the same for every rank and world size.
        """
        return {**self._identity, "epoch": self._epoch, "step": self._step}

    def load_state(self, state: Any) -> None:
        """Continue where `state` was taken. Raise `RunError` if it belongs to another order."""
        if not isinstance(state, dict):
            raise RunError(f"{state!r:.60} is not a loader state; give one from `state()`.")
        if state.get("version") != STATE_VERSION:
            raise RunError(
                f"The loader state is of version {state.get('version')!r:.20}, and this software "
                f"reads rows in the order of version {STATE_VERSION}; go on with the release of "
                "sae-harvest that saved it, or begin anew."
            )
        for field, mine in self._identity.items():
            if state.get(field) != mine:
                raise RunError(
                    f"The loader state has {field} {state.get(field)!r:.200}, this loader has "
                    f"{mine!r}; give the same {field} to continue."
                )
        epoch, step = state.get("epoch", -1), state.get("step", -1)
        counts = all(type(value) is int and value >= 0 for value in (epoch, step))
        if not counts or step > self.batches_per_epoch:
            raise RunError(
                f"The loader state is at batch {step!r:.20} of epoch {epoch!r:.20}, and an epoch "
                f"has {self.batches_per_epoch:,} batches; the state is damaged."
            )
        self.close()
        self._epoch, self._step = epoch, step

    def __iter__(self) -> Iterator[Batch]:
        while True:
            yield self.next_batch()

    def next_batch(self) -> Batch:
        """Return the next batch. The caller owns its memory.

        Raises:
            DamagedError: a chunk of the batch's window is missing or damaged, or a row is not
                finite. The next call raises the error again.
        """
        if self._step == self.batches_per_epoch:
            self._epoch, self._step = self._epoch + 1, 0
        if self._reading is None:
            self._reading = ReadAhead(self._selected, self._order, self._epoch, self._step)
        if self._device.type == "cuda":
            rows, x = self._from_gpu(self._reading)
        else:
            x = tuple(memory.tensor() for memory in self._memory)
            rows = self._gather(self._reading, x)
        self._step += 1
        return Batch(rows, *x)

    def close(self) -> None:
        """Stop the reading threads and free their memory. The loader can be used again."""
        if self._reading is not None:
            self._reading.close()
        self._reading = self._sent = self._upload = None

    def _gather(self, reading: ReadAhead, into: tuple[torch.Tensor, ...]) -> npt.NDArray[np.int64]:
        """Copy this rank's next rows into tensors [share, width] and return their numbers."""
        rows = np.empty(self._order.share, np.int64)
        filled = 0
        while filled < len(rows):
            buffer, there = reading.take(len(rows) - filled)
            here = slice(filled, filled + there.stop - there.start)
            rows[here] = buffer.rows[there]
            for out, x in zip(into, buffer.x, strict=True):
                _copy(torch.from_numpy(x[there]), out[here])
            filled = here.stop
        return rows

    def _from_gpu(
        self, reading: ReadAhead
    ) -> tuple[npt.NDArray[np.int64], tuple[torch.Tensor, ...]]:
        """Return the batch that was sent ahead; send the next one if its rows are read."""
        rows, sent = self._sent or self._send(reading)
        self._sent = self._send(reading) if reading.ready(self._order.share) else None
        return rows, sent.arrive()

    def _send(self, reading: ReadAhead) -> tuple[npt.NDArray[np.int64], Sent]:
        if self._upload is None:
            shapes = [(self._order.share, width) for width in self._widths]
            dtype = torch.from_numpy(np.empty(0, self._store.dtype)).dtype
            self._upload = Upload(shapes, dtype, self._device)
        return self._upload.send(lambda pinned: self._gather(reading, pinned))


def _too_few(store: ActivationStore, rule: RowRule, n_selected: int, batch_rows: int) -> str:
    """Return the error message that says why there is no batch, and what helps."""
    limits, remedies = [], ["harvest more tokens", "use smaller batches"]
    if rule.split != "all":
        limits.append(f"split {rule.split} with heldout_fraction {rule.heldout_fraction:g}")
        change = "lower" if rule.split == "train" else "raise"
        remedies.append(f"{change} --heldout-fraction")
    if rule.max_norm_medians is not None:
        limits.append(f"max_norm_medians {rule.max_norm_medians:g}")
        remedies.append("raise --max-norm-medians")
    found = f"{store.place} has {n_selected:,} rows"
    if limits:
        found = (
            f"The rule ({', '.join(limits)}) reads {n_selected:,} of the {store.n_rows:,} rows of "
            f"{store.place}"
        )
    *most, last = remedies
    return f"{found}, fewer than one batch of {batch_rows:,}; {', '.join(most)} or {last}."


def _copy(x: torch.Tensor, out: torch.Tensor) -> None:
    """Copy contiguous numbers into a tensor of the same shape and any dtype.

    The pieces are too small for torch to divide them among its threads. Those threads would spin
    for milliseconds afterwards, on the cores that the reading threads need.
    """
    pieces = (tensor.view(-1).split(SMALL_NUMBERS) for tensor in (x, out))
    for piece, place in zip(*pieces, strict=True):
        place.copy_(piece)
