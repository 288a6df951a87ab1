"""Dense float64 formulas, gradients by autograd: what the kernels must equal."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sae_harvest.train.sae.kernels import Pairs


def top_k(preactivations: Tensor, k: int) -> Tensor:
    """Keeps the k largest of each row, zero elsewhere: [batch, n_latents]."""
    chosen = preactivations.topk(k, dim=1).indices
    return torch.zeros_like(preactivations).scatter(1, chosen, preactivations.gather(1, chosen))


def project(gradient: Tensor, rows: Tensor) -> Tensor:
    """The gradient without its part along each unit row; both [n_latents, d_in]."""
    return gradient - (gradient * rows).sum(1, keepdim=True) * rows


@dataclass(frozen=True)
class OracleGradients:
    """Gradients (float64) of `pair_gradients`; slopes [batch, w], 0 where there is no pair."""

    enc: Tensor
    dec: Tensor
    bias: Tensor
    slopes: Tensor


def pair_gradients(
    pairs: Pairs, error: Tensor, centred: Tensor, weight_dec: Tensor
) -> OracleGradients:
    """What `Kernels.gradients` computes, by autograd through dense latents.

    The loss whose derivatives are wanted is sum error . (V W_dec) + sum extra pi, with pi =
    W_enc centred + bias and V = values + gain (pi - its own value), so that any W_enc will do.
    """
    n_latents, d_in = len(weight_dec), centred.shape[1]
    there = pairs.indices >= 0
    latents = pairs.indices.clamp(min=0).long()  # [batch, w]

    def dense(numbers: Tensor) -> Tensor:  # [batch, n_latents]
        zeros = torch.zeros(len(centred), n_latents, dtype=torch.float64)
        return zeros.scatter_add(1, latents, numbers.double().masked_fill(~there, 0))

    ones = torch.ones(latents.shape)
    gain = dense(ones if pairs.gain is None else pairs.gain)
    extra = dense(0 * ones if pairs.extra is None else pairs.extra)
    enc = torch.zeros(n_latents, d_in, dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(n_latents, dtype=torch.float64, requires_grad=True)
    dec = weight_dec.double().clone().requires_grad_()
    pi = centred.double() @ enc.T + bias  # [batch, n_latents]
    v = dense(pairs.values) + gain * (pi - pi.detach())
    loss = ((v @ dec) * error.double()).sum() + (extra * pi).sum()
    grads = torch.autograd.grad(loss, (enc, dec, bias, v))
    return OracleGradients(
        enc=grads[0],
        dec=project(grads[1], dec.detach()),
        bias=grads[2],
        slopes=grads[3].gather(1, latents).masked_fill(~there, 0),
    )
