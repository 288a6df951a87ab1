"""Kernels in plain torch, for any device. Large intermediates are computed in chunks of rows.

Sums by latent have a fixed order, so that a step gives the same bits each time.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sae_harvest.train.sae.kernels import AdamNumbers, Gradients, Pairs
from sae_harvest.train.sae.kernels.low import ShortFloat

CHUNK_BYTES = 256 << 20
SCORE_ROUNDING = 2**-8  # relative error of a pre-activation in bfloat16


def _rows(bytes_per_row: int) -> int:
    return max(1, CHUNK_BYTES // bytes_per_row)


class TorchKernels:
    """The `Kernels` of any torch device."""

    def low_precision(self, weight: Tensor) -> ShortFloat:
        return ShortFloat(weight.to(torch.bfloat16))

    def refresh(self, low: ShortFloat, weight: Tensor) -> None:
        low.refresh(weight)

    def choose(self, centred: Tensor, low: ShortFloat, bias: Tensor, count: int) -> Tensor:
        chosen = []
        for chunk in centred.to(low.weight.dtype).split(_rows(4 * len(low.weight))):
            scores = (chunk @ low.weight.T).float() + bias  # [chunk, n_latents]
            chosen.append(scores.topk(count, dim=1, sorted=False).indices.int())
        return torch.cat(chosen)  # [batch, count]

    def choose_above(self, centred: Tensor, low: ShortFloat, bias: Tensor, floor: Tensor) -> Tensor:
        doubt, spread = low.doubt(centred)
        finite = centred.isfinite().all(1, keepdim=True)  # [batch, 1]
        step = _rows(8 * len(low.weight))
        parts = []
        for first in range(0, len(centred), step):
            part = slice(first, first + step)
            scores = (centred[part].to(low.weight.dtype) @ low.weight.T).float()
            scores += SCORE_ROUNDING * scores.abs() + doubt[part].unsqueeze(1) * spread
            # a latent with NaN in its weights is chosen, so that the NaN is seen
            above = ~(scores < floor - bias) & finite[part]  # [chunk, n_latents]
            above[:, 0] |= ~finite[part, 0]
            parts.append(_places(above))
        width = max(1, max((part.shape[1] for part in parts), default=1))
        return torch.cat(
            [torch.nn.functional.pad(p, (0, width - p.shape[1]), value=-1) for p in parts]
        )

    def exact(
        self, centred: Tensor, weight: Tensor, bias: Tensor, candidates: Tensor, k: int, relu: bool
    ) -> tuple[Tensor, Tensor]:
        candidates = candidates.sort(dim=1).values
        dots = self.preactivations(centred, weight, bias, candidates)
        values, order = dots.sort(dim=1, descending=True, stable=True)
        values, order = values[:, :k], order[:, :k]  # [batch, k]
        if relu:
            values = values.clamp(min=0)
        return candidates.gather(1, order), values.contiguous()

    def preactivations(
        self, centred: Tensor, weight: Tensor, bias: Tensor, indices: Tensor
    ) -> Tensor:
        step = _rows(4 * indices.shape[1] * weight.shape[1])
        parts = []
        for x, chunk in zip(centred.split(step), indices.split(step), strict=True):
            latents = chunk.clamp(min=0)
            dots = torch.bmm(weight[latents], x.unsqueeze(2)).squeeze(2)  # [chunk, w]
            parts.append((dots + bias[latents]).masked_fill_(chunk < 0, -torch.inf))
        return torch.cat(parts)  # [batch, w]

    def decode(self, indices: Tensor, values: Tensor, weight: Tensor, out: Tensor) -> None:
        out += torch.nn.functional.embedding_bag(
            indices.clamp(min=0),
            weight,
            per_sample_weights=values.masked_fill(indices < 0, 0),
            mode="sum",
        )

    def gradients(
        self,
        pairs: Pairs,
        error: Tensor,
        centred: Tensor,
        weight_dec: Tensor,
        into: Gradients,
        *,
        add: bool,
        decoder: bool = True,
        slopes: Tensor | None = None,
    ) -> Tensor:
        if not add:
            into.enc.zero_()
            into.dec.zero_()
            into.bias.zero_()
        n_latents, d_out = weight_dec.shape
        d_in = centred.shape[1]
        there = pairs.indices >= 0  # [batch, w]
        indices = pairs.indices.clamp(min=0)
        values = pairs.values.masked_fill(~there, 0)
        dec = torch.zeros_like(into.dec)
        step = _rows(4 * 2 * indices.shape[1] * max(d_in, d_out))
        for first in range(0, len(indices), step):
            part = slice(first, first + step)
            latents = indices[part].long()  # [chunk, w]
            e, x, v = error[part].unsqueeze(1), centred[part].unsqueeze(1), values[part]
            s = torch.bmm(weight_dec[latents], e.transpose(1, 2)).squeeze(2)  # [chunk, w]
            s.masked_fill_(~there[part], 0)
            if slopes is not None:
                slopes[part] = s
            t = s if pairs.gain is None else s * pairs.gain[part]
            if pairs.extra is not None:
                t = t + pairs.extra[part]
            t = t.masked_fill(~there[part], 0)
            where = latents.flatten()
            _add_at(into.enc, where, (t.unsqueeze(2) * x).view(-1, d_in))
            _add_at(into.bias, where, t.flatten())
            if decoder:
                _add_at(dec, where, (v.unsqueeze(2) * e).view(-1, d_out))
        if decoder:
            into.dec += dec - (dec * weight_dec).sum(1, keepdim=True) * weight_dec
        into.squares = into.enc.square().sum(1) + into.dec.square().sum(1)
        if pairs.gain is not None:
            there = there & ((values != 0) | (pairs.gain != 0))
        counts = torch.zeros(n_latents, dtype=torch.int64, device=indices.device)
        return counts.scatter_add_(0, indices.flatten().long(), there.flatten().long())

    def latent_sums(self, indices: Tensor, terms: Tensor, n_latents: int) -> Tensor:
        sums = terms.new_zeros(n_latents)
        terms = terms.masked_fill(indices < 0, 0)
        return _add_at(sums, indices.clamp(min=0).flatten().long(), terms.flatten())

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


def _add_at(out: Tensor, where: Tensor, rows: Tensor) -> Tensor:
    """Add rows[j] to out[where[j]], always in the same order."""
    if out.device.type == "cpu":  # where index_put_ adds in any order, from several threads
        return out.index_add_(0, where, rows)
    return out.index_put_((where,), rows, accumulate=True)  # sorts, so the order is fixed


def _places(above: Tensor) -> Tensor:
    """List where each row of bool [rows, n] is true: int32 [rows, most], increasing, then -1."""
    counts = above.sum(1)  # [rows]
    width = int(counts.max()) if len(counts) else 0
    out = torch.full((len(above), width), -1, dtype=torch.int32, device=above.device)
    row, latent = above.nonzero(as_tuple=True)
    slot = torch.arange(len(row), device=row.device) - (counts.cumsum(0) - counts)[row]
    out[row, slot] = latent.int()
    return out
