"""The first half of the pass: a block of rows is encoded to firings."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError
from threading import Event, Lock
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from sae_harvest.pipelines.features.encoding.firings import Firings
from sae_harvest.train.sae.kernels.gradient_jit import pairs_by_latent

# rows within a block, int32 [batch], and their activations, float32 [batch, d_in]
EncodedRows = tuple[npt.NDArray[np.int32], npt.NDArray[np.float32]]


class Encoder(Protocol):
    """Computes the latents of rows: an `SAE`, or `Neurons`."""

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return indices and values [batch, any]; a value of 0 or less is no firing."""


def batches(
    read: Callable[[int, int], npt.NDArray[np.floating]],
    selected: npt.NDArray[np.bool_],
    first_row: int,
    chunk_rows: int,
    batch_rows: int,
) -> Iterator[EncodedRows]:
    """Yield the selected rows of a block, `batch_rows` at a time.

    Args:
        read: returns activations of the rows [a, b) of the store.
        selected: mask of the rows to encode [rows].
        first_row: number in the store of the block's first row.
        chunk_rows: rows that the store reads at once.
    """
    parts: list[EncodedRows] = []
    waiting, last = 0, first_row + len(selected)
    for chunk in range(first_row - first_row % chunk_rows, last, chunk_rows):
        low, high = max(chunk, first_row), min(chunk + chunk_rows, last)
        inside = np.flatnonzero(selected[low - first_row : high - first_row]).astype(np.int32)
        x = read(low, high) if len(inside) else np.empty(0)
        for start in range(0, len(inside), batch_rows):
            rows = inside[start : start + batch_rows]
            if waiting + len(rows) > batch_rows:
                yield _joined(parts)
                parts, waiting = [], 0
            some = x if len(rows) == len(x) else x[rows]
            parts.append((rows + np.int32(low - first_row), some.astype(np.float32)))
            waiting += len(rows)
    if parts:
        yield _joined(parts)


def _joined(parts: list[EncodedRows]) -> EncodedRows:
    if len(parts) == 1:
        return parts[0]
    rows, x = zip(*parts, strict=True)
    return np.concatenate(rows), np.concatenate(x)


class OneAtATime:
    """An encoder for several threads that only one of them uses at a time."""

    def __init__(self, encoder: Encoder) -> None:
        self._encoder, self._lock = encoder, Lock()

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        with self._lock:
            return self._encoder.encode(x)


def encode(
    encoder: Encoder, n_latents: int, first_row: int, given: Iterator[EncodedRows], stopped: Event
) -> Firings:
    """Compute the firings in a block.

    Args:
        first_row: number of the block's first row.
        given: the block's rows, in batches.
        stopped: set when the result is no longer needed.
    """
    rows, found = [np.empty(0, np.int32)], list[EncodedRows]()
    for some_rows, x in given:
        if stopped.is_set():
            raise CancelledError
        indices, values = encoder.encode(torch.from_numpy(x))
        rows.append(some_rows)
        found.append((indices.cpu().numpy(), values.cpu().numpy()))
    all_indices, all_values = stacked(found)
    starts, places = pairs_by_latent(np.where(all_values > 0, all_indices, -1), n_latents)
    row = np.concatenate(rows)[places // all_indices.shape[1]]
    return Firings(first_row, 0, starts, row, all_values.reshape(-1)[places])


def stacked(
    batches: list[tuple[npt.NDArray[np.int32], npt.NDArray[np.float32]]],
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float32]]:
    """Stack indices and values of batches [rows, w], each with its own w, to [all rows, widest w].

    Narrower batches are padded with values of 0.
    """
    rows = sum(len(values) for _, values in batches)
    width = max((values.shape[1] for _, values in batches), default=1)
    indices, values = np.zeros((rows, width), np.int32), np.zeros((rows, width), np.float32)
    first = 0
    for found, value in batches:
        here = slice(first, first + len(found)), slice(0, found.shape[1])
        indices[here], values[here] = found, value
        first += len(found)
    return indices, values
