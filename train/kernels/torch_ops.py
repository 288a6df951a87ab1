"""Kernels in plain torch, for any device; large intermediates are made a chunk of rows at a time.

Sums by latent go through `index_put_(accumulate=True)`, which CUDA computes by sorting, so that
a step gives the same bits each time.
"""

from __future__ import annotations

import torch
from torch import Tensor

from train.kernels import AdamNumbers, Gradients

CHUNK_BYTES = 256 << 20


def _rows(bytes_per_row: int) -> int:
    return max(1, CHUNK_BYTES // bytes_per_row)


class TorchKernels:
    """The `Kernels` of any torch device."""

    def low_precision(self, weight: Tensor) -> Tensor:
        return weight.to(torch.bfloat16)

    def refresh(self, low: Tensor, weight: Tensor) -> None:
        low.copy_(weight)

    def choose(self, centred: Tensor, low: Tensor, bias: Tensor, count: int) -> Tensor:
        chosen = []
        for chunk in centred.to(low.dtype).split(_rows(4 * len(low))):
            scores = (chunk @ low.T).float() + bias  # [chunk, n_latents]
            chosen.append(scores.topk(count, dim=1, sorted=False).indices.int())
        return torch.cat(chosen)  # [batch, count]

    def exact(
        self, centred: Tensor, weight: Tensor, bias: Tensor, candidates: Tensor, k: int, relu: bool
    ) -> tuple[Tensor, Tensor]:
        step = _rows(4 * candidates.shape[1] * weight.shape[1])
        candidates = candidates.sort(dim=1).values
        parts = []
        for x, chunk in zip(centred.split(step), candidates.split(step), strict=True):
            dots = torch.bmm(weight[chunk], x.unsqueeze(2)).squeeze(2)  # [chunk, count]
            parts.append(dots + bias[chunk])
        values, order = torch.cat(parts).sort(dim=1, descending=True, stable=True)
        values, order = values[:, :k], order[:, :k]  # [batch, k]
        if relu:
            values = values.clamp(min=0)
        return candidates.gather(1, order), values.contiguous()

    def decode(self, indices: Tensor, values: Tensor, weight: Tensor, out: Tensor) -> None:
        out += torch.nn.functional.embedding_bag(
            indices, weight, per_sample_weights=values, mode="sum"
        )

    def gradients(
        self,
        indices: Tensor,
        values: Tensor,
        error: Tensor,
        centred: Tensor,
        weight_dec: Tensor,
        into: Gradients,
        auxiliary: bool,
    ) -> Tensor:
        before = into.dec
        if not auxiliary:
            into.enc.zero_()
            into.bias.zero_()
        into.dec = torch.zeros_like(before)
        step = _rows(4 * 2 * indices.shape[1] * weight_dec.shape[1])
        for first in range(0, len(indices), step):
            part = slice(first, first + step)
            latents = indices[part].long()  # [chunk, k]
            e, x, v = error[part].unsqueeze(1), centred[part].unsqueeze(1), values[part]
            slopes = (weight_dec[latents] @ e.transpose(1, 2)).squeeze(2)  # [chunk, k]
            if not auxiliary:
                slopes = slopes * (v != 0)  # ReLU's slope
            where = (latents.flatten(),)
            width = weight_dec.shape[1]
            into.dec.index_put_(where, (v.unsqueeze(2) * e).view(-1, width), accumulate=True)
            into.enc.index_put_(where, (slopes.unsqueeze(2) * x).view(-1, width), accumulate=True)
            into.bias.index_put_(where, slopes.flatten(), accumulate=True)
        into.dec -= (into.dec * weight_dec).sum(1, keepdim=True) * weight_dec
        if auxiliary:
            into.dec += before
        into.squares = into.enc.square().sum(1) + into.dec.square().sum(1) + into.bias.square()
        took_part = indices if auxiliary else indices[values != 0]
        return torch.bincount(took_part.flatten(), minlength=len(weight_dec))

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
        gradient = gradient * numbers.scale
        first.lerp_(gradient, 1 - numbers.beta1)
        second.mul_(numbers.beta2).addcmul_(gradient, gradient, value=1 - numbers.beta2)
        weight.addcdiv_(first, second.sqrt() * numbers.root + numbers.eps, value=-numbers.rate)
        if unit_rows:
            weight /= weight.norm(dim=1, keepdim=True)
        average.lerp_(weight, 1 - numbers.keep)
