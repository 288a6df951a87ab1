"""Kernels for the CPU: torch for the one large product, compiled loops for the rest."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from sae_harvest.common.private_apis import multiplies_int8
from sae_harvest.train.sae.kernels import AdamNumbers, Gradients, Pairs, cpu_choice
from sae_harvest.train.sae.kernels.by_rows import by_rows
from sae_harvest.train.sae.kernels.cpu_low import Float32, Int8
from sae_harvest.train.sae.kernels.exact_jit import decode_rows, exact_pairs, exact_rows
from sae_harvest.train.sae.kernels.gradient_jit import (
    adam_rows,
    add_by_latent,
    count_live,
    latent_gradients,
    pairs_by_latent,
)

PARTS = 64  # pieces of the latents, with about equal numbers of pairs, for the threads
ROW_COST = 4  # writing a latent's gradients costs as much as about this many pairs
MIN_BLOCK, BLOCK_PAIRS = 256, 48  # for gradients computed in blocks of rows


class CpuKernels:
    """The `Kernels` of the CPU. Results are the same to the bit for any number of threads."""

    def __init__(self) -> None:
        self._short = multiplies_int8()

    def low_precision(self, weight: Tensor) -> Int8 | Float32:
        return Int8.of(weight) if self._short else Float32(weight)

    def refresh(self, low: Int8 | Float32, weight: Tensor) -> None:
        low.refresh(weight)

    def choose(self, centred: Tensor, low: Int8 | Float32, bias: Tensor, count: int) -> Tensor:
        return cpu_choice.largest(low.factors(centred), bias, count)

    def choose_both_ends(
        self, centred: Tensor, low: Int8 | Float32, bias: Tensor, count: int
    ) -> tuple[Tensor, Tensor]:
        """Choose latents with the largest and with the smallest pre-activations; see `choose`."""
        return cpu_choice.both_ends(low.factors(centred), bias, count)

    def choose_above(
        self, centred: Tensor, low: Int8 | Float32, bias: Tensor, floor: Tensor
    ) -> Tensor:
        return cpu_choice.above(low.factors(centred), floor - bias)

    def exact(
        self, centred: Tensor, weight: Tensor, bias: Tensor, candidates: Tensor, k: int, relu: bool
    ) -> tuple[Tensor, Tensor]:
        indices = torch.empty(len(centred), k, dtype=torch.int32)
        values = torch.empty(len(centred), k)
        x, given, weights = centred.numpy(), candidates.numpy(), (weight.numpy(), bias.numpy())
        out = indices.numpy(), values.numpy()

        def exact(rows: slice) -> None:
            exact_rows(x[rows], *weights, given[rows], relu, *(array[rows] for array in out))

        by_rows(len(centred), exact)
        return indices, values

    def preactivations(
        self, centred: Tensor, weight: Tensor, bias: Tensor, indices: Tensor
    ) -> Tensor:
        values = torch.empty(indices.shape)
        x, given, weights = centred.numpy(), indices.numpy(), (weight.numpy(), bias.numpy())
        out = values.numpy()
        by_rows(len(x), lambda rows: exact_pairs(x[rows], *weights, given[rows], out[rows]))
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
    """Return some rows as an array; an array of shape [0, 0] for None."""
    return np.empty((0, 0), np.float32) if tensor is None else tensor[rows].numpy()


def _balanced(starts: Any) -> Any:
    """Return the bounds of pieces of the latents with equal cost: int64 [PARTS + 1]."""
    cost = starts + ROW_COST * np.arange(len(starts))
    return np.searchsorted(cost, np.linspace(0, cost[-1], PARTS + 1))


def _rows_at_a_time(batch: int, counts: Any) -> int:
    """Return the number of rows in a block of gradients, given the pairs of each latent.

    Without blocks, each latent with many pairs would read most of the batch from memory. The rows
    of a block in which a latent has BLOCK_PAIRS pairs stay in the cache from latent to latent.
    """
    pairs, live = int(counts.sum()), int(np.count_nonzero(counts))
    step = max(MIN_BLOCK, BLOCK_PAIRS * batch * live // max(1, pairs))
    return step if 2 * step <= batch else max(1, batch)
