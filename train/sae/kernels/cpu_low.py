"""Encoder weights on the processor in low precision: 8-bit integers where it multiplies them fast.

A product of 8-bit integers takes half the time of one in bfloat16 and, being exact, gives the
same bits however it is cut up.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sae_harvest.common.private_apis import int8_product
from sae_harvest.train.sae.kernels.by_rows import by_rows
from sae_harvest.train.sae.kernels.low import DEVIATIONS, candidates
from sae_harvest.train.sae.kernels.quantize_jit import (
    blocks_of,
    padded_width,
    quantize_rows,
    quantize_weights,
    random_signs,
)


@dataclass(frozen=True)
class Factors:
    """Rows and latents as a product takes them.

    The pre-activation of row r and latent l without its bias is close to rows[r] . latents[l]
    * row_scale[r] * scale[l], and off by doubt[r] * spread[l] at most.

    rows: [batch, width]; latents: [n_latents, width], both int8 or both float32;
    row_scale, doubt: float32 [batch]; scale, spread: float32 [n_latents].
    """

    rows: Tensor
    latents: Tensor
    row_scale: Tensor
    scale: Tensor
    doubt: Tensor
    spread: Tensor

    def product(self, some_rows: slice, some_latents: slice, scratch: Tensor) -> Tensor:
        """Scores, int32 or float32 [rows, latents], in the memory of int32 [rows * latents]."""
        rows, latents = self.rows[some_rows], self.latents[some_latents]
        out = scratch[: len(rows) * len(latents)].view(len(rows), len(latents))
        if rows.dtype == torch.int8:
            return int8_product(rows, latents.T, out)
        # NaN is chosen, so that exact values show it
        return torch.mm(rows, latents.T, out=out.view(torch.float32)).nan_to_num_(torch.inf)


class Int8:
    """Weights as 8-bit codes, one scale for each latent; see `quantize_jit`."""

    def __init__(self, d_in: int, codes: Tensor, scale: Tensor, norms: Tensor) -> None:
        self._d_in = d_in
        self._codes, self._scale, self._norms = codes, scale, norms

    @classmethod
    def of(cls, rows: Tensor) -> Int8:
        """The codes of float32 rows [any, d_in]."""
        count, d_in = rows.shape
        codes = torch.empty(count, padded_width(d_in), dtype=torch.int8)
        low = cls(d_in, codes, torch.empty(count), torch.empty(count))
        source, signs, blocks, *out = low._arrays(rows)

        def quantize(some: slice) -> None:
            quantize_rows(source[some], signs, blocks, *(array[some] for array in out))

        by_rows(count, quantize)
        return low

    def refresh(self, rows: Tensor) -> None:
        quantize_weights(*self._arrays(rows))

    def _arrays(self, rows: Tensor) -> Any:
        """The arguments of `quantize_rows`, in its order."""
        given = rows.numpy(), random_signs(self._d_in), blocks_of(self._d_in)
        return *given, self._codes.numpy(), self._scale.numpy(), self._norms.numpy()

    def rows(self, latents: Tensor) -> Int8:
        return Int8(self._d_in, self._codes[latents], self._scale[latents], self._norms[latents])

    def candidates(self, k: int) -> int:
        return candidates(k, len(self._codes))

    def factors(self, centred: Tensor) -> Factors:
        """The product's factors for a batch [batch, d_in].

        Rounding to steps of s moves each part by s / sqrt(12), at random. In a pre-activation
        the steps of the row weigh |W_l|, those of the latent |c|; the sum of both is taken.
        """
        x = Int8.of(centred)
        steps = self._scale / self._norms.clamp(min=torch.finfo(torch.float32).tiny)
        worst = steps.max() if len(steps) else steps.sum()
        doubt = DEVIATIONS * 12**-0.5 * (x._scale + worst * x._norms)
        return Factors(x._codes, self._codes, x._scale, self._scale, doubt, self._norms)


class Float32:
    """The weights themselves, for processors without fast short products."""

    def __init__(self, weight: Tensor) -> None:
        self._weight = weight

    def refresh(self, weight: Tensor) -> None:
        self._weight = weight

    def rows(self, latents: Tensor) -> Float32:
        return Float32(self._weight[latents])

    def candidates(self, k: int) -> int:
        return candidates(k, len(self._weight))

    def factors(self, centred: Tensor) -> Factors:
        """The product's factors for a batch [batch, d_in]; rounding is off by d_in units."""
        norms = torch.linalg.vector_norm(centred, dim=1)
        spread = torch.linalg.vector_norm(self._weight, dim=1)
        unit = torch.finfo(torch.float32).eps * centred.shape[1]
        ones = torch.ones_like(norms), torch.ones_like(spread)
        return Factors(centred, self._weight, *ones, unit * norms, spread)
