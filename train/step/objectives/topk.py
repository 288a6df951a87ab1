"""TopK (Gao et al. 2024): the k largest ReLU(pi) of each row, and no penalty.

With Multi-TopK, the loss at 4k latents is added with a weight, so that the SAE stays good with
another k.
"""

from __future__ import annotations

from torch import Tensor

from sae_harvest.train.sae.kernels import Pairs
from sae_harvest.train.step.objectives.outcome import Outcome, outcome
from sae_harvest.train.step.reconstruction import reconstruct, widened
from sae_harvest.train.step.step_context import StepContext


def topk(batch: StepContext) -> Outcome:
    """Compute the reconstruction loss, with Multi-TopK; its gradients are in the workspace."""
    config, group = batch.config, batch.group
    assert config.k is not None
    if config.multi_topk == 0:
        indices, values = largest(batch, config.k)
        indices, values = group.keep_top(indices, values, config.k)
        return outcome(batch, reconstruct(batch, Pairs.active(indices, values)))
    indices, values = largest(batch, config.wide_k)
    own = min(config.k, indices.shape[1])
    narrow = group.keep_top(
        indices[:, :own].contiguous(), values[:, :own].contiguous(), config.k
    )  # before the wider choice, which may change its arguments
    wide = group.keep_top(indices, values, config.wide_k)
    return outcome(
        batch, widened(batch, Pairs.active(*narrow), Pairs.active(*wide), config.multi_topk)
    )


def largest(batch: StepContext, k: int) -> tuple[Tensor, Tensor]:
    """Return the k largest ReLU(pi) of each row among this process's latents, in decreasing order.

    Returns:
        indices int32 [batch, k], values float32 [batch, k], or all latents if they are fewer.
    """
    sae = batch.sae
    k = min(k, len(sae.W_enc))
    chosen = sae.kernels.choose(batch.centred, sae.low, sae.b_enc, sae.low.candidates(k))
    return sae.kernels.exact(batch.centred, sae.W_enc, sae.b_enc, chosen, k, relu=True)
