"""ReLU with an L1 penalty (Bricken et al. 2023; Cunningham et al. 2023).

    penalty = l1 * mean over rows of sum_i v_i |W_dec[i]| / sqrt(total_variance)

Decoder rows have unit norm, so longer decoder rows cannot evade the penalty.
"""

from __future__ import annotations

import torch

from sae_harvest.train.sae.kernels import Pairs
from sae_harvest.train.step.objectives.outcome import Outcome, outcome
from sae_harvest.train.step.reconstruction import reconstruct
from sae_harvest.train.step.step_context import StepContext


def l1_slope(batch: StepContext) -> float:
    """Return d penalty / d v of a pair."""
    weight = batch.penalty_share * batch.config.l1
    return float(weight / (batch.n_rows * batch.total_variance**0.5))


def relu_l1(batch: StepContext) -> Outcome:
    """Compute reconstruction loss and L1 penalty; their gradients are in the workspace."""
    indices, pi = batch.above(torch.zeros_like(batch.sae.b_enc))  # [batch, w]
    values, slope = pi.clamp(min=0), l1_slope(batch)
    pairs = Pairs(indices, values, extra=torch.full_like(values, slope))
    penalty = slope * batch.total(values)
    return outcome(batch, reconstruct(batch, pairs), l1_loss=penalty)
