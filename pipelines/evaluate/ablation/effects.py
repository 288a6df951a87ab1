"""The effect of one change of activations on logits, in a few numbers.

With e the changed logits minus the plain ones, [T, V], and at each token the median over the
vocabulary subtracted, since a constant does not change probabilities:

    l1, l2       sum |e|, and the root of sum e^2, over all V T numbers
    sparsity     (l1 / l2)^2 / (V T): 1 / (V T) if one logit moves, 1 if all move equally
    kl           mean over the tokens of KL(plain || changed), in nats
    delta_ce     mean over the tokens of the cross-entropy of the token that follows, changed minus
                 plain, in nats
    up, down     the vocabulary's tokens whose e, averaged over the T tokens, is highest and lowest

Gao et al. (2024), section 4.5. The median of an even number of values is the mean of the two in the
middle.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

MOVED = 10  # tokens listed in each direction


@dataclass(frozen=True, slots=True)
class Effect:
    """An effect on the logits of T tokens."""

    kl: float
    """Nats per token."""

    delta_ce: float
    """Nats per token."""

    l1: float
    """Sum of absolute changes of logits."""

    l2: float
    """Root of the sum of squared changes of logits."""

    up_ids: list[int]
    """Tokens of the vocabulary whose logits rise most, at most 10."""

    up_logits: list[float]
    """Their mean changes, decreasing."""

    down_ids: list[int]
    """Tokens of the vocabulary whose logits fall most, at most 10."""

    down_logits: list[float]
    """Their mean changes, increasing."""


def effect_of(plain: Tensor, changed: Tensor, following: Tensor) -> Effect:
    """Compute the effect from logits.

    Args:
        plain, changed: floating point, [T, V].
        following: int64 [T], the token that follows each of the T tokens.
    """
    moved = centred(changed - plain)
    mean = moved.mean(0)  # [V]
    count = min(MOVED, len(mean))
    up, down = mean.topk(count), mean.topk(count, largest=False)
    before, after = torch.log_softmax(plain, -1), torch.log_softmax(changed, -1)
    share = before.exp()
    kl = (share * (before - after).masked_fill_(share == 0, 0.0)).sum(dtype=torch.float64)
    ce = (before - after).gather(1, following[:, None]).sum(dtype=torch.float64)
    return Effect(
        kl=kl.item() / len(plain),
        delta_ce=ce.item() / len(plain),
        l1=moved.abs().sum(dtype=torch.float64).item(),
        l2=moved.square().sum(dtype=torch.float64).sqrt().item(),
        up_ids=up.indices.tolist(),
        up_logits=up.values.tolist(),
        down_ids=down.indices.tolist(),
        down_logits=down.values.tolist(),
    )


def centred(change: Tensor) -> Tensor:
    """Subtract from changes of logits [T, V] the median over the vocabulary at each token."""
    lower = change.median(dim=1, keepdim=True).values  # of an even number, the lower one
    if change.shape[1] % 2:
        return change - lower
    upper = -(-change).median(dim=1, keepdim=True).values
    return change - (lower + upper) / 2
