"""The largest of many dot products, found as an SAE finds its latents."""

from __future__ import annotations

import torch
from torch import Tensor

from train.kernels import kernels_for

BATCH = 4096
SPARE = 2  # times as many are looked at exactly as wanted


def largest_products(x: Tensor, weight: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """The n rows of `weight` with the largest dot product with each row of `x`.

    A low-precision product names the candidates, exact float32 products decide. What all rows have
    in common is taken out first, or low precision would see nothing else.

    Args:
        x: float32 [some, d]. weight: float32 [many, d], many >= n.

    Returns:
        indices int64 [some, n] and products float32 [some, n] in decreasing order, each less the
        mean product over all of `weight`.
    """
    kernels = kernels_for(weight.device)
    weight = weight - weight.mean(dim=0)
    common = x.mean(dim=0)
    low, bias = kernels.low_precision(weight), weight @ common
    count = min(low.candidates(SPARE * n), len(weight))
    indices, products = [], []
    for batch in (x - common).split(BATCH):
        chosen = kernels.choose(batch, low, bias, count)
        found, product = kernels.exact(batch, weight, bias, chosen, n, relu=False)
        indices.append(found.long())
        products.append(product)
    return torch.cat(indices), torch.cat(products)
