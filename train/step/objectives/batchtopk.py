"""BatchTopK (Bussmann et al. 2024): the batch * k largest ReLU(pi) of the whole batch.

A hard row may have more latents and an easy one fewer. For use without a batch, a latent is active
where pi exceeds a threshold: the mean over batches of the least value that was kept, here a running
mean (`train.step.learner`).

The choice is exact. A sixteenth of the rows gives an estimate of the least kept value; all pairs
above a little less than that are found; if the estimate was too high, it is lowered and they are
found again. Pairs that equal the least kept value are all kept, so that rows which are equal get
equal latents.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sae_harvest.train.sae.kernels import Pairs
from sae_harvest.train.step.objectives.outcome import Outcome, outcome
from sae_harvest.train.step.reconstruction import reconstruct
from sae_harvest.train.step.step_context import StepContext

EVERY = 16  # one row in so many is looked at for the estimate
MAX_OVER_K = 4  # largest values of such a row, in units of k
MARGIN = 0.9  # the estimate is lowered to this share: it errs by some per cent
LOWERED = 0.5  # and to this share of that, each time it was too high
TRIES = 3  # after which all positive pre-activations are found


def batchtopk(batch: StepContext) -> Outcome:
    """Return the gradients of the reconstruction loss in the batch's workspace."""
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
        if least >= floor:  # so none of them was left out
            break
        floor *= LOWERED
    cut = pi < least  # [batch, w]
    return indices.masked_fill(cut, -1), pi.masked_fill(indices < 0, 0), least


def _estimate(batch: StepContext, k: int) -> float:
    """About the (n_rows * k)-th largest value of the batch, from a part of the rows."""
    sae = batch.sae
    rows = batch.centred[::EVERY].contiguous()  # [batch / EVERY, d_in]
    count = min(len(sae.W_enc), MAX_OVER_K * k)
    chosen = sae.kernels.choose(rows, sae.low, sae.b_enc, count)
    pi = sae.kernels.preactivations(rows, sae.W_enc, sae.b_enc, chosen)  # [rows, count]
    n_rows = batch.group.sum_rows(torch.tensor(len(rows), device=rows.device))
    return batch.group.reach(pi, int(n_rows) * k)
