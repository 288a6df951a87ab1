"""Low-precision encoder weights on the CPU: 8-bit integers, if the CPU multiplies them fast.

A product of 8-bit integers takes half the time of one in bfloat16. It is exact, so that it gives
the same bits however it is divided.
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
    """The two factors of the product of rows and latents.

    The pre-activation of row r and latent l, without its bias, is about rows[r] . latents[l]
    * row_scale[r] * scale[l]. The error is at most doubt[r] * spread[l].
    """

    rows: Tensor
    """[batch, width], int8 or float32."""
    latents: Tensor
    """[n_latents, width], in the dtype of `rows`."""
    row_scale: Tensor
    """float32 [batch]."""
    scale: Tensor
    """float32 [n_latents]."""
    doubt: Tensor
    """float32 [batch], the row's factor of the error."""
    spread: Tensor
    """float32 [n_latents], the latent's factor of the error."""

    def product(self, some_rows: slice, some_latents: slice, scratch: Tensor) -> Tensor:
        """Compute scores, int32 or float32 [rows, latents], in `scratch` int32 [rows * latents]."""
        rows, latents = self.rows[some_rows], self.latents[some_latents]
        out = scratch[: len(rows) * len(latents)].view(len(rows), len(latents))
        if rows.dtype == torch.int8:
            return int8_product(rows, latents.T, out)
        # NaN becomes infinity, so that the latent is chosen and its exact value shows the NaN
        return torch.mm(rows, latents.T, out=out.view(torch.float32)).nan_to_num_(torch.inf)


class Int8:
    """Weights as 8-bit codes, one scale for each latent; see `quantize_jit`."""

    def __init__(self, d_in: int, codes: Tensor, scale: Tensor, norms: Tensor) -> None:
        self._d_in = d_in
        self._codes, self._scale, self._norms = codes, scale, norms

    @classmethod
    def of(cls, rows: Tensor) -> Int8:
        """Quantize float32 rows [any, d_in]."""
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
        """Return the arguments of `quantize_rows`, in its order."""
        given = rows.numpy(), random_signs(self._d_in), blocks_of(self._d_in)
        return *given, self._codes.numpy(), self._scale.numpy(), self._norms.numpy()

    def rows(self, latents: Tensor) -> Int8:
        return Int8(self._d_in, self._codes[latents], self._scale[latents], self._norms[latents])

    def candidates(self, k: int) -> int:
        return candidates(k, len(self._codes))

    def factors(self, centred: Tensor) -> Factors:
        """Return the product's factors for a batch [batch, d_in].

        Rounding to steps of s changes each number by a random error with standard deviation
        s / sqrt(12). In a pre-activation, the error of the row is multiplied by |W_l| and the error
        of the latent by |c|; the sum of both is used.
        """
        x = Int8.of(centred)
        steps = self._scale / self._norms.clamp(min=torch.finfo(torch.float32).tiny)
        worst = steps.max() if len(steps) else steps.sum()
        doubt = DEVIATIONS * 12**-0.5 * (x._scale + worst * x._norms)
        return Factors(x._codes, self._codes, x._scale, self._scale, doubt, self._norms)


class Float32:
    """The weights in float32, for CPUs without fast low-precision products."""

    def __init__(self, weight: Tensor) -> None:
        self._weight = weight

    def refresh(self, weight: Tensor) -> None:
        self._weight = weight

    def rows(self, latents: Tensor) -> Float32:
        return Float32(self._weight[latents])

    def candidates(self, k: int) -> int:
        return candidates(k, len(self._weight))

    def factors(self, centred: Tensor) -> Factors:
        """Return the product's factors for a batch [batch, d_in]; the error is up to d_in units."""
        norms = torch.linalg.vector_norm(centred, dim=1)
        spread = torch.linalg.vector_norm(self._weight, dim=1)
        unit = torch.finfo(torch.float32).eps * centred.shape[1]
        ones = torch.ones_like(norms), torch.ones_like(spread)
        return Factors(centred, self._weight, *ones, unit * norms, spread)
