"""Losses and gradients of one batch, latents never dense.

The AuxK loss is the paper's, with one choice made explicit: auxiliary pre-activations are not
cut by ReLU. A latent that is dead because its pre-activations are negative would get no gradient
through ReLU, which is the very case the loss is for; without it, every chosen dead latent's
encoder row gets one.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from train.kernels import Gradients
from train.sae import SAE, candidates

ROUNDING = 1e-5  # share of a sum of squares that float32 rounding may leave of its spread


@dataclass(frozen=True)
class StepResult:
    """Losses and counts of one batch; the gradients are in the workspace.

    loss: squared error per row over the data's total variance; auxk: the AuxK loss, its weight
    included; fvu: squared error over the batch's own variance; l0: active latents per row;
    fired: bool [n_latents]; grad_norm: norm of the whole gradient before clipping.
    """

    loss: float
    auxk: float
    fvu: float
    l0: float
    fired: Tensor
    grad_norm: float


class Workspace:
    """Gradients and batch-sized buffers, kept from step to step: fresh pages cost a third more.

    centred, error: float32 [batch_rows, d_in]. Smaller batches use a part of them.
    """

    def __init__(self, sae: SAE, batch_rows: int) -> None:
        self.gradients = Gradients.like(sae.W_enc)
        self.centred = sae.W_enc.new_empty(batch_rows, sae.config.d_in)
        self.error = torch.empty_like(self.centred)


def _squares(rows: Tensor) -> float:
    """Sum of squares of float32 [batch, d_in]; across rows in float64."""
    return float(torch.linalg.vector_norm(rows, dim=1).double().square().sum())


def _spread(rows: Tensor, squares: float) -> float:
    """Sum over rows of the squared distance to the mean row, 0 if that is within rounding."""
    mean = rows.mean(0).double()  # [d_in]
    spread = squares - len(rows) * float(mean.square().sum())
    return spread if spread > ROUNDING * squares else 0.0


def train_step(
    sae: SAE,
    x: Tensor,
    total_variance: float,
    dead: Tensor,
    k_aux: int,
    auxk_alpha: float,
    workspace: Workspace,
) -> StepResult:
    """Gradients of `loss + auxk` at one batch.

    Args:
        sae: weights, left alone.
        x: float32 [batch, d_in].
        total_variance: variance of x / input_scale, summed over dimensions.
        dead: bool [n_latents].
        k_aux: dead latents per row, at most.
        auxk_alpha: weight of AuxK.
        workspace: its gradients are overwritten.
    """
    rows, into = len(x), workspace.gradients
    centred = sae.centre(x, out=workspace.centred[:rows])  # [batch, d_in]
    indices, values = sae.encode_centred(centred)  # [batch, k] each
    error = torch.neg(centred, out=workspace.error[:rows])  # x_hat' - x', once decoded:
    sae.kernels.decode(indices, values, sae.W_dec, error)  # b_dec cancels
    squared = _squares(error)
    spread = _spread(centred, _squares(centred))
    target = -error if auxk_alpha > 0 and bool(dead.any()) else None
    slope = error.mul_(2 / (rows * total_variance))  # d loss / d x_hat'
    counts = sae.kernels.gradients(
        indices, values, slope, centred, sae.W_dec, into, auxiliary=False
    )
    # b_dec is added by the decoder and subtracted before the encoder; AuxK doesn't reach it
    into.b_dec = slope.sum(0) - into.bias @ sae.W_enc
    auxk = 0.0
    if target is not None:
        auxk = _auxiliary(sae, centred, target, dead, k_aux, auxk_alpha, into)
    grad_square = into.squares.double().sum() + into.b_dec.double().square().sum()
    return StepResult(
        loss=squared / (rows * total_variance),
        auxk=auxk,
        fvu=squared / spread if spread > 0 else 0.0,
        l0=float(counts.sum()) / rows,
        fired=counts > 0,
        grad_norm=float(grad_square.sqrt()),
    )


def _auxiliary(
    sae: SAE,
    centred: Tensor,
    target: Tensor,
    dead: Tensor,
    k_aux: int,
    auxk_alpha: float,
    into: Gradients,
) -> float:
    """Adds the gradients of AuxK; the loss. `target` is the error x' - x_hat', a constant."""
    spread = _spread(target, _squares(target))
    if spread == 0:  # one row, or rows that are all off alike
        return 0.0
    latents = dead.nonzero().squeeze(1)  # [n_dead]
    k = min(k_aux, len(latents))
    count = candidates(k, len(latents))
    if count == len(latents):
        chosen = latents.int().expand(len(centred), -1).contiguous()  # [batch, n_dead]
    else:
        local = sae.kernels.choose(centred, sae.low[latents], sae.b_enc[latents], count)
        chosen = latents.int()[local.long()]  # [batch, count]
    indices, values = sae.kernels.exact(centred, sae.W_enc, sae.b_enc, chosen, k, relu=False)
    error = target.neg_()  # e_hat - e, once decoded
    sae.kernels.decode(indices, values, sae.W_dec, error)
    squared = _squares(error)
    slope = error.mul_(2 * auxk_alpha / spread)
    sae.kernels.gradients(indices, values, slope, centred, sae.W_dec, into, auxiliary=True)
    return auxk_alpha * squared / spread
