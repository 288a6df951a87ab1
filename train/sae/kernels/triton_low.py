"""Encoder weights in a low-precision type of the tensor cores, stored by groups of latents.

With G groups of 32 members, latent l is member l // G of group l % G, so that neighbouring latents,
such as the prefixes of a nested dictionary, are in different groups. Four groups are interleaved in
memory, so that 128 consecutive positions hold four whole groups:

    position(member m, group g) = 128 (g // 4) + 4 m + g % 4

G is a multiple of 8, and positions without a latent hold zeros. Rows are padded with zeros to a
multiple of 128 numbers, so that kernels need no masks along them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sae_harvest.train.sae.kernels.low import DEVIATIONS, candidates, fourth_norm

MEMBERS, LANES, GROUP_STEP, DEPTH_STEP = 32, 4, 8, 128
FP8_LARGEST = 448.0  # the largest number of e4m3
MIN_SCALE = 1e-30  # the scale of a row of zeros
FP8_LEAST_MARGIN = 32
# Upper bound of the standard deviation of a product's relative error when both factors are rounded:
# uniform within half a unit, twice. One unit is 2^-8 for bfloat16 and 2^-3 for e4m3.
BF16_ERROR, FP8_ERROR = (2 / 3) ** 0.5 * 2**-9, (2 / 3) ** 0.5 * 2**-4


def _up(number: int, step: int) -> int:
    return -(-number // step) * step


def shorten(rows: Tensor, fp8: bool) -> tuple[Tensor, Tensor]:
    """Convert rows to the low-precision type, padded with zeros, with a scale for each row.

    Args:
        rows: float32 [any, d].
        fp8: use e4m3, with each row scaled to the largest number of the type; else bfloat16.

    Returns:
        Rows [any, depth], depth a multiple of 128; scales float32 [any], 1 for bfloat16.
    """
    if fp8:
        scale = torch.linalg.vector_norm(rows, torch.inf, dim=1) / FP8_LARGEST
        scale = scale.clamp_(min=MIN_SCALE)
        short = (rows / scale.unsqueeze(1)).to(torch.float8_e4m3fn)
    else:
        scale = rows.new_ones(len(rows))
        short = rows.to(torch.bfloat16)
    depth = _up(rows.shape[1], DEPTH_STEP)
    if depth == rows.shape[1]:
        return short, scale
    wide = short.new_zeros(len(rows), depth)
    wide[:, : rows.shape[1]] = short
    return wide, scale


class GroupedLow:
    """The `Low` of `TritonKernels`.

    values: bfloat16 or e4m3 [positions, depth]; scales: float32 [positions];
    groups: G; n_latents; d_in; fp8.
    """

    def __init__(self, n_latents: int, d_in: int, fp8: bool, device: torch.device) -> None:
        self.n_latents, self.d_in, self.fp8 = n_latents, d_in, fp8
        self.groups = _up(-(-n_latents // MEMBERS), GROUP_STEP)
        dtype = torch.float8_e4m3fn if fp8 else torch.bfloat16
        shape = (self.groups * MEMBERS, _up(d_in, DEPTH_STEP))
        self.values = torch.zeros(shape, dtype=dtype, device=device)
        self.scales = torch.ones(len(self.values), device=device)
        self.spread = torch.zeros(n_latents, device=device)
        self._positions = self.positions(torch.arange(n_latents, device=device))

    def positions(self, latents: Tensor) -> Tensor:
        """Return the positions of latents in `values`, int64 [any]."""
        member, group = latents // self.groups, latents % self.groups
        block = group // LANES * (LANES * MEMBERS)
        return block + member * LANES + group % LANES

    def latents(self) -> Tensor:
        """The latent of each position, int64 [positions]; n_latents or more where there is none."""
        place = torch.arange(len(self.values), device=self.values.device)
        group = place // (LANES * MEMBERS) * LANES + place % LANES
        return place // LANES % MEMBERS * self.groups + group

    def by_position(self, numbers: Tensor, empty: float) -> Tensor:
        """Rearrange numbers by latent, [n_latents], to [positions]; `empty` without a latent."""
        out = numbers.new_full((len(self.values),), empty)
        return out.index_copy_(0, self._positions, numbers)

    def refresh(self, weight: Tensor) -> None:
        short, scale = shorten(weight, self.fp8)
        self._place(short, scale, fourth_norm(weight))

    def _place(self, short: Tensor, scale: Tensor, spread: Tensor) -> None:
        kind = torch.int8 if self.fp8 else torch.int16  # copies the bits, not the values
        self.values.view(kind).index_copy_(0, self._positions, short.view(kind))
        self.scales.index_copy_(0, self._positions, scale)
        self.spread.copy_(spread)

    def rows(self, latents: Tensor) -> GroupedLow:
        some = GroupedLow(len(latents), self.d_in, self.fp8, self.values.device)
        source = self.positions(latents)
        kind = torch.int8 if self.fp8 else torch.int16
        short = self.values.view(kind)[source].view(self.values.dtype)
        some._place(short, self.scales[source], self.spread[latents])
        return some

    def candidates(self, k: int) -> int:
        """Return k and a margin.

        e4m3 causes an error of about 0.04 standard deviations in a pre-activation. Near the k-th
        largest of a normal distribution there are about 3 k latents per deviation, so k / 2 of them
        are within four deviations of the difference of two errors. In 256 rows each of normal
        numbers and of SmolLM2's activations, with 20,000 latents, the k = 8, 32 and 128 largest
        were among the 14, 52 and 190 first in low precision.
        """
        if not self.fp8:
            return candidates(k, self.n_latents)
        return min(self.n_latents, k + max(FP8_LEAST_MARGIN, k // 2))

    def doubt(self, centred: Tensor) -> Tensor:
        """Return float32 [batch]; times `spread`, it bounds the error of a pre-activation."""
        error = FP8_ERROR if self.fp8 else BF16_ERROR
        return DEVIATIONS * error * fourth_norm(centred)
