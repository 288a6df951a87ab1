"""The first half of the pass: a block of rows is encoded."""

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
    """Gives rows their latents: an `SAE`, or `Neurons`."""

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Indices and values [batch, any]; what is not above 0 does not fire."""


def batches(
    read: Callable[[int, int], npt.NDArray[np.floating]],
    selected: npt.NDArray[np.bool_],
    first_row: int,
    chunk_rows: int,
    batch_rows: int,
) -> Iterator[EncodedRows]:
    """The rows of a block that count, so many at a time.

    Args:
        read: activations of the rows [a, b) of the store.
        selected: which rows count [rows]; first_row: the first one's number in the store.
        chunk_rows: that the store reads at once.
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
    """An encoder for several threads, where it has to be left to one of them at a time."""

    def __init__(self, encoder: Encoder) -> None:
        self._encoder, self._lock = encoder, Lock()

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        with self._lock:
            return self._encoder.encode(x)


def encode(
    encoder: Encoder, n_latents: int, first_row: int, given: Iterator[EncodedRows], stopped: Event
) -> Firings:
    """The firings in a block.

    Args:
        first_row: of the block; given: its rows.
        stopped: set when nobody waits for it any more.
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
    """Indices and values of batches [rows, w], each with its own w, as one [all rows, widest w].

    Values of 0 fill narrower ones up.
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
