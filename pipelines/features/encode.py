"""The first half of the pass: a block of rows is encoded."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from functools import partial
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from harvest.ahead import Ahead
from pipelines.features.firings import Firings
from train.kernels.gradient_jit import pairs_by_latent

# rows within a block, int32 [batch], and their activations, float32 [batch, d_in]
Batch = tuple[npt.NDArray[np.int32], npt.NDArray[np.float32]]


class Encoder(Protocol):
    """What gives rows their latents: `train.sae.SAE`, or `pipelines.features.neurons.Neurons`."""

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Indices and values [batch, any]; what is not above 0 does not fire."""


def batches(
    read: Callable[[int, int], npt.NDArray[np.floating]],
    selected: npt.NDArray[np.bool_],
    first_row: int,
    chunk_rows: int,
    batch_rows: int,
) -> Iterator[Batch]:
    """The rows of a block that count, so many at a time.

    Args:
        read: activations of the rows [a, b) of the store.
        selected: which rows count [rows]; first_row: the first one's number in the store.
        chunk_rows: that the store reads at once.
    """
    parts: list[Batch] = []
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


def _joined(parts: list[Batch]) -> Batch:
    if len(parts) == 1:
        return parts[0]
    rows, x = zip(*parts, strict=True)
    return np.concatenate(rows), np.concatenate(x)


def encode(
    encoder: Encoder, n_latents: int, blocks: Iterator[tuple[int, Iterator[Batch]]]
) -> Generator[Callable[[], Firings], None, None]:
    """What fires in each block, whose rows are read and prepared while others are encoded.

    Args:
        blocks: first row of each, and its rows.

    Yields:
        what sorts a block's firings: it can be left to another thread.
    """

    def batches_and_ends() -> Iterator[tuple[int, Batch | None]]:
        for first_row, given in blocks:
            yield from ((first_row, batch) for batch in given)
            yield first_row, None

    ahead = Ahead(batches_and_ends())
    rows, found = [np.empty(0, np.int32)], list[Batch]()
    try:
        while (item := ahead.take()) is not None:
            first_row, batch = item
            if batch is not None:
                fired = encoder.encode(torch.from_numpy(batch[1]))
                rows.append(batch[0])
                found.append((fired[0].cpu().numpy(), fired[1].cpu().numpy()))
                continue
            yield partial(_by_latent, first_row, n_latents, rows, found)
            rows, found = [np.empty(0, np.int32)], []
    finally:
        ahead.close()


def _by_latent(
    first_row: int,
    n_latents: int,
    rows: list[npt.NDArray[np.int32]],
    found: list[tuple[npt.NDArray[np.int32], npt.NDArray[np.float32]]],
) -> Firings:
    indices, values = stacked(found)
    starts, places = pairs_by_latent(np.where(values > 0, indices, -1), n_latents)
    row = np.concatenate(rows)[places // indices.shape[1]]
    return Firings(first_row, 0, starts, row, values.reshape(-1)[places])


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
