"""Encoder weights in low precision, and the error that it causes in a pre-activation."""

from __future__ import annotations

import torch
from torch import Tensor

MIN_MARGIN = 8  # candidates beyond k
DEVIATIONS = 4.0  # a floor is lowered by so many standard deviations of the error
CHUNK_ELEMENTS = 1 << 20


def candidates(k: int, n_latents: int) -> int:
    """Return how many latents to choose in low precision, to have the exact k largest among them.

    Rounding changes a pre-activation by 0.004 (bfloat16) or 0.011 (int8) standard deviations. Of
    24,576 latents, one or two are so close to the 32nd largest; a margin of eight finds all of them
    (docs/kernels.md).
    """
    return min(n_latents, k + max(MIN_MARGIN, k // 8))


def fourth_norm(rows: Tensor) -> Tensor:
    """Compute (sum_i x_i^4)^(1/4) of each row of [any, d], in float32."""
    step = max(1, CHUNK_ELEMENTS // rows.shape[1])
    return torch.cat(
        [torch.linalg.vector_norm(part.float(), 4, dim=1) for part in rows.split(step)]
    )


class ShortFloat:
    """Weights [n_latents, d_in] in bfloat16."""

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight
        self._spread: Tensor | None = None

    def refresh(self, weight: Tensor) -> None:
        self.weight.copy_(weight)
        self._spread = None

    def rows(self, latents: Tensor) -> ShortFloat:
        return ShortFloat(self.weight[latents])

    def candidates(self, k: int) -> int:
        return candidates(k, len(self.weight))

    def doubt(self, centred: Tensor) -> tuple[Tensor, Tensor]:
        """Return float32 [batch] and [n_latents]; their product bounds a pre-activation's error.

        Rounding both factors changes a term c_i w_i by a random relative error with standard
        deviation u = 2^-9 sqrt(2/3) or less (uniform within half a unit, twice). So it changes the
        sum by u sqrt(sum c_i^2 w_i^2) <= u |c|_4 |w|_4 (Cauchy-Schwarz).
        """
        if self._spread is None:
            self._spread = fourth_norm(self.weight)
        return DEVIATIONS * 2**-9 * (2 / 3) ** 0.5 * fourth_norm(centred), self._spread
