"""Pairs sorted by latent, and sums of one number per pair.

A stable sort puts the pairs of a latent next to each other, in the order of rows. So sums need no
atomics and give the same bits each time.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

SUM_WIDTH = 256  # terms that a program adds at a time


@dataclass(frozen=True)
class Sorted:
    """Pairs in the order of their latents; places without a pair come last."""

    places: Tensor
    """int64 [batch * w], row * w + slot of each pair."""
    rows: Tensor
    """int32 [batch * w], the row of each pair."""
    starts: Tensor
    """int64 [n_latents + 1], where each latent's pairs begin."""

    @classmethod
    def of(cls, indices: Tensor, n_latents: int) -> Sorted:
        flat = torch.where(indices < 0, n_latents, indices).flatten()
        latents, places = flat.sort(stable=True)
        every = torch.arange(n_latents + 1, dtype=latents.dtype, device=latents.device)
        rows = (places // indices.shape[1]).int()
        return cls(places, rows, torch.searchsorted(latents, every))


@triton.jit
def _sums_kernel(
    starts: tl.tensor, places: tl.tensor, terms: tl.tensor, sums: tl.tensor, WIDTH: tl.constexpr
) -> None:
    """Sum one latent's terms."""
    latent = tl.program_id(0).to(tl.int64)
    first, last = tl.load(starts + latent), tl.load(starts + latent + 1)
    total = tl.zeros((WIDTH,), tl.float32)
    for start in tl.range(first, last, WIDTH):
        pair = start + tl.arange(0, WIDTH)
        place = tl.load(places + pair, mask=pair < last, other=0)
        total += tl.load(terms + place, mask=pair < last, other=0.0)
    tl.store(sums + latent, tl.sum(total, 0))


def sum_by_latent(indices: Tensor, terms: Tensor, n_latents: int) -> Tensor:
    """`Kernels.latent_sums`."""
    pairs = Sorted.of(indices, n_latents)
    sums = torch.empty(n_latents, device=terms.device)
    _sums_kernel[(n_latents,)](
        pairs.starts, pairs.places, terms.contiguous(), sums, WIDTH=SUM_WIDTH, num_warps=1
    )
    return sums
