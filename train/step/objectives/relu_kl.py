"""ReLU with a target density of each latent (Ng 2011, "Sparse autoencoder", CS294A notes).

    penalty = kl / k * sum_i KL(rho || rho_i),   rho = k / n_latents
    KL(rho || q) = rho log(rho / q) + (1 - rho) log((1 - rho) / (1 - q))

In the notes rho_i is the mean activation of a sigmoid unit. ReLU is not bounded, so here rho_i is
the mean of a hard sigmoid of pi. It is 1 if the latent is clearly active. Its slope is nonzero only
in a window of width `bandwidth` around 0, so only pairs near the threshold have a gradient:

    h(pi) = clamp(pi / bandwidth + 1/2, 0, 1),   rho_i = (1 + sum over rows of h(pi_i)) / (rows + 2)

One extra row with the latent and one without it keep a dead latent's KL finite. The division by k
is also ours: if all densities are wrong by some factor, the cost is the same for every k.
"""

from __future__ import annotations

import torch

from sae_harvest.train.sae.kernels import Pairs
from sae_harvest.train.step.objectives.outcome import Outcome, outcome
from sae_harvest.train.step.reconstruction import reconstruct
from sae_harvest.train.step.step_context import StepContext


def relu_kl(batch: StepContext) -> Outcome:
    """Compute reconstruction loss and KL penalty; their gradients are in the workspace."""
    config, width = batch.config, batch.config.bandwidth
    assert config.k is not None
    indices, pi = batch.above(torch.full_like(batch.sae.b_enc, -width / 2))  # [batch, w]
    rows = batch.n_rows + 2
    soft = (pi / width + 0.5).clamp_(0, 1)  # [batch, w]
    found = (batch.latent_sums(indices, soft).double() + 1) / rows  # [n_latents]
    wanted = torch.full_like(found, config.k / config.n_latents)
    divergence = torch.xlogy(wanted, wanted / found)
    divergence += torch.xlogy(1 - wanted, (1 - wanted) / (1 - found))
    weight = batch.penalty_share * config.kl / config.k
    penalty = weight * float(batch.group.sum_latents(divergence.sum()))
    slope = (weight / (rows * width) * ((1 - wanted) / (1 - found) - wanted / found)).float()
    near = pi.abs() < width / 2  # [batch, w]
    extra = slope[indices.clamp(min=0)].masked_fill(~near, 0)  # [batch, w]
    pairs = Pairs(indices, pi.clamp(min=0), gain=(pi > 0).float(), extra=extra)
    return outcome(batch, reconstruct(batch, pairs), kl_loss=penalty)
