"""Gated SAE (Rajamanoharan et al. 2024, "Improving dictionary learning with gated SAEs").

    v = [pi > 0] ReLU(exp(r_mag) (pi - b_enc) + b_mag)
    penalty = l1 * mean over rows of sum_i ReLU(pi_i) / sqrt(total_variance)
    auxiliary = |decode(ReLU(pi)) - x'|^2, in the units of the reconstruction loss

The gate [pi > 0] has no slope, so the reconstruction trains only magnitudes. L1 and the auxiliary
reconstruction, through a fixed decoder, train the gate. Both train W_enc. b_enc is trained only as
the gate's bias, since the magnitude does not depend on it.
"""

from __future__ import annotations

import torch

from sae_harvest.train.sae.kernels import Pairs
from sae_harvest.train.step.objectives.outcome import Outcome
from sae_harvest.train.step.objectives.relu_l1 import l1_slope
from sae_harvest.train.step.reconstruction import error_of, reconstruct
from sae_harvest.train.step.step_context import StepContext


def gated(batch: StepContext) -> Outcome:
    """Compute all three losses; their gradients are in the batch's workspace."""
    sae, into = batch.sae, batch.workspace.gradients
    indices, pi = batch.above(torch.zeros_like(sae.b_enc))  # [batch, w]
    gate, slope = pi.clamp(min=0), l1_slope(batch)
    error = error_of(batch, indices, gate, "error")  # [batch, d_out]
    auxiliary = batch.squares(error) / (batch.n_rows * batch.total_variance)
    error.mul_(batch.error_slope)
    pairs = Pairs(indices, gate, extra=torch.full_like(gate, slope))
    sae.kernels.gradients(pairs, error, batch.centred, sae.W_dec, into, add=False, decoder=False)
    gate_bias = into.bias.clone()  # [n_latents]

    values = sae.activate(indices, pi)  # [batch, w]
    growth = sae.of_latents("r_mag", indices).exp_()
    gain = growth.masked_fill(values <= 0, 0)
    slopes = torch.empty_like(pi)
    result = reconstruct(batch, Pairs(indices, values, gain), add=True, slopes=slopes)
    slopes.masked_fill_(values <= 0, 0)  # d loss / d b_mag
    before = sae.of_latents("b_mag", indices)
    batch.workspace.extra["b_mag"] = batch.latent_sums(indices, slopes)
    batch.workspace.extra["r_mag"] = batch.latent_sums(indices, slopes * (values - before))
    pulls = into.bias.clone()
    into.bias.copy_(gate_bias)
    penalties = {"l1_loss": slope * batch.total(gate), "gate_loss": auxiliary}
    return Outcome(result, penalties, pulls)
