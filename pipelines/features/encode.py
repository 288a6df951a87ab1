"""The first half of the pass: a block of rows is encoded."""

from __future__ import annotations

from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pipelines.features.firings import Firings
from train.kernels.gradient_jit import pairs_by_latent


class Encoder(Protocol):
    """What gives rows their latents: `train.sae.SAE`, or `pipelines.features.neurons.Neurons`."""

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Indices and values [batch, any]; what is not above 0 does not fire."""


def encode(
    encoder: Encoder,
    n_latents: int,
    x: npt.NDArray[np.floating],
    selected: npt.NDArray[np.bool_],
    first_row: int,
    batch_rows: int,
) -> Firings:
    """What fires in a block.

    Args:
        x: the block's activations [rows, d_in]; selected: which of them count [rows].
        first_row: the first one's number in the store.
        batch_rows: encoded at a time.
    """
    rows = np.flatnonzero(selected).astype(np.int32)
    batches = []
    for low in range(0, len(rows), batch_rows):
        batch = torch.from_numpy(x[rows[low : low + batch_rows]]).float()
        found, activations = encoder.encode(batch)
        batches.append((found.cpu().numpy(), activations.cpu().numpy()))
    indices, values = stacked(batches)
    starts, places = pairs_by_latent(np.where(values > 0, indices, -1), n_latents)
    row = rows[places // indices.shape[1]]
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
