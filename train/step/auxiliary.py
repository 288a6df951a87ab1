"""AuxK (Gao et al. 2024): dead latents reconstruct the error of the other latents.

    auxk = auxk_alpha * sum |e_hat - e|^2 / sum |e - mean e|^2,   e = x' - x_hat', a constant

e_hat decodes the k_aux largest pre-activations among dead latents. They are not cut by ReLU, a
threshold or a gate. A latent that is dead because its pre-activations are low would get no gradient
through any of these, and the loss is meant for such latents. Without the cut, the encoder row of
every chosen dead latent gets a gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sae_harvest.train.sae.kernels import Pairs
from sae_harvest.train.step.step_context import StepContext


def add_auxiliary(batch: StepContext, slope: Tensor, dead: Tensor) -> float:
    """Add the gradients of AuxK to those in the workspace and return the loss.

    Args:
        slope: float32 [batch, d_out], the error times `StepContext.error_slope`; overwritten.
        dead: the dead latents, bool [n_latents].
    """
    sae, group, config = batch.sae, batch.group, batch.config
    n_dead = int(group.sum_latents(dead.sum()))
    if n_dead == 0 or config.auxk_alpha == 0:
        return 0.0
    residual = slope.mul_(-1 / batch.error_slope)  # e, [batch, d_out]
    spread = batch.spread(residual, batch.squares(residual))
    if spread == 0:  # one row, or rows that all have the same error
        return 0.0
    k = min(config.auxiliary_k(sae.config.width_out), n_dead)
    indices, values = group.keep_top(*_largest(batch, dead.nonzero().squeeze(1), k), k)
    error = residual.neg_()  # e_hat - e, once decoded
    if group.latent_part != 0:
        error.zero_()
    sae.kernels.decode(indices, values, sae.W_dec, error)
    group.sum_latents(error)
    squared = batch.squares(error)
    error.mul_(2 * config.auxk_alpha / spread)
    sae.kernels.gradients(
        Pairs(indices, values),
        error,
        batch.centred,
        sae.W_dec,
        batch.workspace.gradients,
        add=True,
    )
    return float(config.auxk_alpha * squared / spread)


def _largest(batch: StepContext, latents: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return the k largest pi of each row among `latents` (int64 [n]), or all if they are fewer.

    Returns:
        indices int32 [batch, w], values float32 [batch, w], in decreasing order; w >= 1.
    """
    sae, centred = batch.sae, batch.centred
    if len(latents) == 0:  # other processes hold the dead latents
        none = torch.full((len(centred), 1), -1, dtype=torch.int32, device=centred.device)
        return none, torch.zeros_like(none, dtype=torch.float32)
    k = min(k, len(latents))
    low = sae.low.rows(latents)
    count = low.candidates(k)
    if count == len(latents):
        chosen = latents.int().expand(len(centred), -1).contiguous()  # [batch, n]
    else:
        local = sae.kernels.choose(centred, low, sae.b_enc[latents], count)
        chosen = latents.int()[local.long()]  # [batch, count]
    return sae.kernels.exact(centred, sae.W_enc, sae.b_enc, chosen, k, relu=False)
