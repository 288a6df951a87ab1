"""Kernels for the processor: torch for the one large product, compiled loops for the rest."""

from __future__ import annotations

from collections.abc import Iterator
from threading import Lock
from typing import Any

import numpy as np
import torch
from torch import Tensor

from train.kernels import AdamNumbers, Gradients, Pairs
from train.kernels.cpu_low import Factors, Float32, Int8
from train.kernels.exact_jit import decode_rows, exact_pairs, exact_rows
from train.kernels.gradient_jit import (
    adam_rows,
    add_by_latent,
    count_live,
    latent_gradients,
    pairs_by_latent,
)
from train.kernels.selection_jit import (
    LEAST,
    append_above,
    finish_largest,
    merge_largest,
    room_for,
)

TILE_ROWS, TILE_LATENTS = 1024, 1024  # scores of a tile stay in the last-level cache
LEAST_ROOM = 64  # latents above their floor that a row has room for at first
PARTS = 64  # pieces of the latents, balanced by their pairs, that threads take
ROW_COST = 4  # writing a latent's gradients costs about as much as this many pairs
LEAST_BLOCK, BLOCK_PAIRS = 256, 48  # of gradients taken some rows at a time


class CpuKernels:
    """The `Kernels` of the processor. Results are the same bits for any number of threads."""

    def __init__(self) -> None:
        self._scratch = torch.empty(TILE_ROWS * TILE_LATENTS, dtype=torch.int32)
        self._lock = Lock()
        # without the instruction, products of 8-bit integers are emulated
        self._short = torch.cpu._is_vnni_supported()

    def low_precision(self, weight: Tensor) -> Int8 | Float32:
        return Int8.of(weight) if self._short else Float32(weight)

    def refresh(self, low: Int8 | Float32, weight: Tensor) -> None:
        low.refresh(weight)

    def choose(self, centred: Tensor, low: Int8 | Float32, bias: Tensor, count: int) -> Tensor:
        factors = low.factors(centred)
        # a latent that is not finite is always chosen: its exact value shows it
        offset = bias.where((bias + factors.spread).isfinite(), torch.inf)
        batch, room = len(centred), room_for(count)
        keys, places = np.empty((batch, room), np.int32), np.empty((batch, room), np.int32)
        found, floors = np.zeros(batch, np.int64), np.full(batch, LEAST, np.int32)
        for rows, latents, scores in self._tiles(factors):
            merge_largest(
                scores,
                factors.row_scale[rows].numpy(),
                factors.scale[latents].numpy(),
                offset[latents].numpy(),
                latents.start,
                count,
                keys[rows],
                places[rows],
                found[rows],
                floors[rows],
            )
        out = torch.empty(batch, count, dtype=torch.int32)
        finish_largest(keys, places, found, floors, out.numpy())
        return out

    def choose_above(
        self, centred: Tensor, low: Int8 | Float32, bias: Tensor, floor: Tensor
    ) -> Tensor:
        factors = low.factors(centred)
        least = floor - bias
        found = np.zeros(len(centred), np.int64)
        out = np.full((len(centred), LEAST_ROOM), -1, np.int32)
        for rows, latents, scores in self._tiles(factors):
            while True:
                needed = np.empty(len(scores), np.int64)
                append_above(
                    scores,
                    factors.row_scale[rows].numpy(),
                    factors.scale[latents].numpy(),
                    least[latents].numpy(),
                    factors.doubt[rows].numpy(),
                    factors.spread[latents].numpy(),
                    latents.start,
                    out[rows],
                    found[rows],
                    needed,
                )
                if needed.max() <= out.shape[1]:
                    break
                more = ((0, 0), (0, needed.max() * 2 - out.shape[1]))
                out = np.pad(out, more, constant_values=-1)
            found[rows] = needed
        width = int(found.max(initial=1))
        return torch.from_numpy(np.ascontiguousarray(out[:, :width]))

    def _tiles(self, factors: Factors) -> Iterator[tuple[slice, slice, Any]]:
        """Slices of the rows and of the latents, and their scores, [rows, latents]."""
        with self._lock:
            for first_row in range(0, len(factors.rows), TILE_ROWS):
                rows = slice(first_row, first_row + TILE_ROWS)
                for first in range(0, len(factors.latents), TILE_LATENTS):
                    latents = slice(first, first + TILE_LATENTS)
                    yield rows, latents, factors.product(rows, latents, self._scratch).numpy()

    def exact(
        self, centred: Tensor, weight: Tensor, bias: Tensor, candidates: Tensor, k: int, relu: bool
    ) -> tuple[Tensor, Tensor]:
        indices = torch.empty(len(centred), k, dtype=torch.int32)
        values = torch.empty(len(centred), k)
        exact_rows(
            centred.numpy(),
            weight.numpy(),
            bias.numpy(),
            candidates.numpy(),
            relu,
            indices.numpy(),
            values.numpy(),
        )
        return indices, values

    def preactivations(
        self, centred: Tensor, weight: Tensor, bias: Tensor, indices: Tensor
    ) -> Tensor:
        values = torch.empty(indices.shape)
        exact_pairs(centred.numpy(), weight.numpy(), bias.numpy(), indices.numpy(), values.numpy())
        return values

    def decode(self, indices: Tensor, values: Tensor, weight: Tensor, out: Tensor) -> None:
        decode_rows(indices.numpy(), values.numpy(), weight.numpy(), out.numpy())

    def gradients(
        self,
        pairs: Pairs,
        error: Tensor,
        centred: Tensor,
        weight_dec: Tensor,
        into: Gradients,
        *,
        add: bool,
        decoder: bool = True,
        slopes: Tensor | None = None,
    ) -> Tensor:
        n_latents, batch = len(weight_dec), len(error)
        order = pairs_by_latent(pairs.indices.numpy(), n_latents)
        counts = np.diff(order[0])
        step = _rows_at_a_time(batch, counts)
        for first in range(0, max(1, batch), step):
            rows = slice(first, first + step)
            if step < batch:
                order = pairs_by_latent(pairs.indices[rows].numpy(), n_latents)
            latent_gradients(
                *order,
                _balanced(order[0]),
                pairs.values[rows].numpy(),
                _array(pairs.gain, rows),
                _array(pairs.extra, rows),
                error[rows].numpy(),
                centred[rows].numpy(),
                weight_dec.numpy(),
                add or first > 0,
                decoder,
                into.enc.numpy(),
                into.dec.numpy(),
                into.bias.numpy(),
                into.squares.numpy(),
                _array(slopes, rows),
            )
        if slopes is not None:
            slopes.masked_fill_(pairs.indices < 0, 0)
        if pairs.gain is not None:
            counts = np.zeros(n_latents, np.int64)
            arrays = (pairs.indices.numpy(), pairs.values.numpy(), pairs.gain.numpy())
            count_live(*arrays, counts)
        return torch.from_numpy(counts)

    def latent_sums(self, indices: Tensor, terms: Tensor, n_latents: int) -> Tensor:
        sums = torch.zeros(n_latents, dtype=torch.float64)
        add_by_latent(indices.numpy(), terms.numpy(), sums.numpy())
        return sums.float()

    def adam(
        self,
        weight: Tensor,
        gradient: Tensor,
        first: Tensor,
        second: Tensor,
        average: Tensor,
        numbers: AdamNumbers,
        unit_rows: bool,
    ) -> None:
        adam_rows(
            weight.numpy(),
            gradient.numpy(),
            first.numpy(),
            second.numpy(),
            average.numpy(),
            np.array(
                [
                    numbers.scale,
                    numbers.rate,
                    numbers.beta1,
                    numbers.beta2,
                    numbers.root,
                    numbers.eps,
                    numbers.keep,
                ],
                np.float32,
            ),
            unit_rows,
        )


def _array(tensor: Tensor | None, rows: slice) -> Any:
    return None if tensor is None else tensor[rows].numpy()


def _balanced(starts: Any) -> Any:
    """Bounds of pieces of the latents that cost alike: int64 [PARTS + 1]."""
    cost = starts + ROW_COST * np.arange(len(starts))
    return np.searchsorted(cost, np.linspace(0, cost[-1], PARTS + 1))


def _rows_at_a_time(batch: int, counts: Any) -> int:
    """Rows whose gradients are taken together, given the pairs of each latent.

    Latents with many pairs would each read most of the batch from memory; so many rows that a
    latent has BLOCK_PAIRS of them stay in the cache from one latent to the next.
    """
    pairs, live = int(counts.sum()), int(np.count_nonzero(counts))
    step = max(LEAST_BLOCK, BLOCK_PAIRS * batch * live // max(1, pairs))
    return step if 2 * step <= batch else max(1, batch)
