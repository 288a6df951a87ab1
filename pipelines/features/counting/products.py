"""The largest and smallest of many dot products, found as an SAE finds its latents."""

from __future__ import annotations

import torch
from torch import Tensor

from sae_harvest.train.sae.kernels.cpu import CpuKernels

BATCH = 4096
SPARE = 2  # times as many are looked at exactly as wanted


def extreme_products(
    x: Tensor, weight: Tensor, n: int
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """The n rows of `weight` with the largest dot product with each row of `x`, and the smallest.

    A low-precision product names the candidates, exact float32 products decide. What all rows have
    in common is taken out first, or low precision would see nothing else.

    Args:
        x: float32 [some, d]. weight: float32 [many, d], many >= n. Both on the processor.

    Returns:
        of the largest, then of the smallest: indices int64 [some, n] and products float32 [some, n]
        from the end inwards, each less the mean product over all of `weight`.
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
