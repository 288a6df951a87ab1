"""Nearest latents by the cosine of their decoder rows, over all pairs."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

BLOCK = 1024  # rows of the similarity matrix at a time: [1024, n_latents] is never large


def decoder_neighbours(
    W_dec: torch.Tensor, n_neighbours: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
    """The latents whose decoder rows point most nearly the same way.

    Args:
        W_dec: [n_latents, d_in] float32.

    Returns:
        Latents and cosines, [n_latents, min(n_neighbours, n_latents - 1)], nearest first.
    """
    unit = torch.nn.functional.normalize(W_dec, dim=1)
    n_latents = len(unit)
    n = min(n_neighbours, n_latents - 1)
    latents = torch.empty(n_latents, n, dtype=torch.int64)
    cosines = torch.empty(n_latents, n)
    for first in range(0, n_latents, BLOCK):
        similarity = unit[first : first + BLOCK] @ unit.T  # [block, n_latents]
        own = torch.arange(first, first + len(similarity))
        similarity[torch.arange(len(similarity)), own] = -torch.inf
        cosines[own], latents[own] = similarity.topk(n, dim=1)
    return latents.numpy(), cosines.numpy()
