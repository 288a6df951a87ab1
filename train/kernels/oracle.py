"""The SAE step by its dense formulas in float64, gradients by autograd: what kernels must equal."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


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
