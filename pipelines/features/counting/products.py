"""The largest and smallest of many dot products, by the kernels that find an SAE's latents."""

from __future__ import annotations

import torch
from torch import Tensor

from sae_harvest.train.sae.kernels.cpu import CpuKernels

BATCH = 4096
SPARE = 2  # products computed exactly, per product needed


def extreme_products(
    x: Tensor, weight: Tensor, n: int
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Find the n rows of `weight` with the largest, and the smallest, products with each row of
    `x`.

    A low-precision product finds the candidates, exact float32 products decide. The mean of all
    rows is subtracted first, because it would dominate in low precision.

    Args:
        x: float32 [some, d]. weight: float32 [many, d], many >= n. Both on the processor.

    Returns:
        For the largest, then for the smallest: indices int64 [some, n] and products float32 [some,
        n], most extreme first, minus the mean product over all of `weight`.
    """
    kernels = CpuKernels()
    weight = weight - weight.mean(dim=0)
    common = x.mean(dim=0)
    low, bias = kernels.low_precision(weight), weight @ common
    count = min(low.candidates(SPARE * n), len(weight))
    found: list[list[tuple[Tensor, Tensor]]] = [[], []]
    for some in x.split(BATCH):
        batch = some - common
        ends = kernels.choose_both_ends(batch, low, bias, count)
        for sign, chosen, parts in zip((1, -1), ends, found, strict=True):
            given = sign * batch, weight, sign * bias, chosen
            indices, products = kernels.exact(*given, n, relu=False)
            parts.append((indices.long(), sign * products))
    return _joined(found[0]), _joined(found[1])


def _joined(parts: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    indices, products = zip(*parts, strict=True)
    return torch.cat(indices), torch.cat(products)
