"""JumpReLU with a target L0 (Rajamanoharan et al. 2024, "Jumping ahead").

    v = pi where pi > theta, else 0
    penalty = l0 * (L0 / k - 1)^2,   L0 = mean over rows of the number of active latents

The paper penalises L0 itself; the square around a target comes from dictionary_learning. Step
functions have no slope, so theta gets the paper's straight-through gradients, from a rectangle of
width eps = `bandwidth`, K(u) = [|u| < 1/2]:

    d v / d theta        := -(theta / eps) K((pi - theta) / eps)
    d [pi > theta] / d theta := -(1 / eps) K((pi - theta) / eps)

pi gets no gradient from these formulas. The trained parameter is log(theta), so theta is positive.
"""

from __future__ import annotations

import torch

from sae_harvest.train.sae.kernels import Pairs
from sae_harvest.train.step.objectives.outcome import Outcome, outcome
from sae_harvest.train.step.reconstruction import reconstruct
from sae_harvest.train.step.step_context import StepContext


def jumprelu(batch: StepContext) -> Outcome:
    """Compute reconstruction loss and L0 penalty; their gradients are in the workspace."""
    config, sae, width = batch.config, batch.sae, batch.config.bandwidth
    assert config.k is not None
    indices, pi = batch.above(sae.extra["threshold"] - width / 2)  # [batch, w]
    theta = sae.of_latents("threshold", indices)  # [batch, w]
    active = pi > theta
    excess = batch.total(active) / (batch.n_rows * config.k) - 1
    weight = batch.penalty_share * config.l0
    per_active = weight * 2 * excess / (config.k * batch.n_rows)  # d penalty / d [pi > theta]
    pairs = Pairs(indices, pi.masked_fill(~active, 0), gain=active.float())
    slopes = torch.empty_like(pi)  # d loss / d v, [batch, w]
    result = reconstruct(batch, pairs, slopes=slopes)
    near = (pi - theta).abs() < width / 2
    terms = (slopes * theta).add_(per_active).mul_(-1 / width).masked_fill_(~near, 0)
    by_theta = batch.latent_sums(indices, terms)  # [n_latents]
    batch.workspace.extra["threshold"] = by_theta * sae.extra["threshold"]  # by log theta
    return outcome(batch, result, l0_loss=weight * excess**2)
