"""The SAE step by its dense formulas in float64, gradients by autograd: what kernels must equal."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from train.kernels import Pairs


@dataclass(frozen=True)
class OracleStep:
    """Losses (plain numbers) and gradients (float64); `dec` has no part along decoder rows."""

    loss: float
    auxk: float
    enc: Tensor
    dec: Tensor
    bias: Tensor
    b_dec: Tensor


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


def dense_step(
    x: Tensor,
    W_enc: Tensor,
    W_dec: Tensor,
    b_enc: Tensor,
    b_dec: Tensor,
    k: int,
    input_scale: float,
    total_variance: float,
    dead: Tensor,
    k_aux: int,
    auxk_alpha: float,
) -> OracleStep:
    """Losses and gradients of one batch.

    loss = mean_rows |x' - x_hat'|^2 / total_variance with x' = x / input_scale, plus
    auxk = auxk_alpha * sum |e_hat - e|^2 / sum |e - mean e|^2, where e = x' - x_hat' is a
    constant and e_hat decodes the k_aux largest dead pre-activations, of either sign.

    Args:
        x: [batch, d_in]; W_enc, W_dec: [n_latents, d_in]; b_enc: [n_latents]; b_dec: [d_in].
        dead: bool [n_latents].
    """
    x = x.double() / input_scale
    enc, dec = (w.double().clone().requires_grad_() for w in (W_enc, W_dec))
    bias, offset = (b.double().clone().requires_grad_() for b in (b_enc, b_dec))
    latents = top_k(torch.relu((x - offset) @ enc.T + bias), k)  # [batch, n_latents]
    error = latents @ dec + offset - x  # [batch, d_in]
    loss = error.square().sum(1).mean() / total_variance
    auxk = torch.zeros((), dtype=torch.float64)
    target = -error.detach()
    spread = (target - target.mean(0)).square().sum()
    if dead.any() and spread > 0:
        preactivations = (x - offset.detach()) @ enc[dead].T + bias[dead]
        guess = top_k(preactivations, min(k_aux, int(dead.sum()))) @ dec[dead]
        auxk = auxk_alpha * (guess - target).square().sum() / spread
    grads = torch.autograd.grad(loss + auxk, (enc, dec, bias, offset))
    return OracleStep(
        loss=loss.item(),
        auxk=auxk.item(),
        enc=grads[0],
        dec=project(grads[1], dec.detach()),
        bias=grads[2],
        b_dec=grads[3],
    )
