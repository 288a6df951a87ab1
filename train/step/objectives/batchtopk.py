"""BatchTopK (Bussmann et al. 2024): the batch * k largest ReLU(pi) of the whole batch.

A hard row may have more latents than an easy one. Without a batch, a latent is active if pi exceeds
a threshold: the mean over batches of the least kept value, here a running mean
(`train.step.learner`).

The choice is exact. A sixteenth of the rows gives an estimate of the least kept value. All pairs
above a little less than the estimate are found. If the estimate was too high, it is lowered and the
search repeated. All pairs equal to the least kept value are kept, so equal rows get equal latents.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sae_harvest.train.sae.kernels import Pairs
from sae_harvest.train.step.objectives.outcome import Outcome, outcome
from sae_harvest.train.step.reconstruction import reconstruct
from sae_harvest.train.step.step_context import StepContext

EVERY = 16  # the estimate uses one of this many rows
MAX_OVER_K = 4  # largest values of such a row, in units of k
MARGIN = 0.9  # the estimate, which errs by some per cent, is lowered to this share
LOWERED = 0.5  # further factor each time the estimate was too high
TRIES = 3  # after which all positive pre-activations are found


def batchtopk(batch: StepContext) -> Outcome:
    """Compute the reconstruction loss; its gradients are in the batch's workspace."""
    assert batch.config.k is not None
    indices, values, least = largest_of_batch(batch, batch.config.k)
    result = outcome(batch, reconstruct(batch, Pairs(indices, values)))
    result.least_kept = least
    return result


def largest_of_batch(batch: StepContext, k: int) -> tuple[Tensor, Tensor, float]:
    """Return the n_rows * k largest ReLU(pi), over all processes.

    Returns:
        indices: int32 [batch, w], -1 for none; values: float32 [batch, w];
        the least of them, 0 if fewer are positive.
    """
    sae, group, count = batch.sae, batch.group, batch.n_rows * k
    floor = MARGIN * _estimate(batch, k)
    for attempt in range(TRIES + 1):
        if attempt == TRIES:
            floor = 0.0
        indices, pi = batch.above(torch.full_like(sae.b_enc, floor))  # [batch, w]
        least = group.reach(pi, count)
        if least >= floor:  # no pair was missed
            break
        floor *= LOWERED
    cut = pi < least  # [batch, w]
    return indices.masked_fill(cut, -1), pi.masked_fill(indices < 0, 0), least


def _estimate(batch: StepContext, k: int) -> float:
    """Estimate the batch's (n_rows * k)-th largest value from a part of the rows."""
    sae = batch.sae
    rows = batch.centred[::EVERY].contiguous()  # [batch / EVERY, d_in]
    count = min(len(sae.W_enc), MAX_OVER_K * k)
    chosen = sae.kernels.choose(rows, sae.low, sae.b_enc, count)
    pi = sae.kernels.preactivations(rows, sae.W_enc, sae.b_enc, chosen)  # [rows, count]
    n_rows = batch.group.sum_rows(torch.tensor(len(rows), device=rows.device))
    return batch.group.reach(pi, int(n_rows) * k)
