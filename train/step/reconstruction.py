"""The reconstruction loss of a batch's pairs, and its gradients.

plain        sum |x_hat' - x'|^2 / (rows * total_variance)
nested       the mean of that over reconstructions from the first m latents, for several m
             (Matryoshka; Bussmann et al. 2025, "Learning multi-level features")
widened      plain with k latents, plus a weight times plain with 4k (Multi-TopK; Gao et al. 2024)
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import Tensor

from sae_harvest.train.sae.kernels import Pairs
from sae_harvest.train.step.step_context import StepContext


@dataclass
class Reconstruction:
    """Losses and slopes for the rest of a step; gradients are in the batch's workspace."""

    loss: float
    """The reconstruction loss: plain, nested or the narrow part of widened."""
    squared: float
    """Squared error of all pairs, over all processes' rows."""
    slope: Tensor
    """Error of all pairs times `StepContext.error_slope`, float32 [batch, d_out]."""
    decoder_slope: Tensor
    """d loss / d x_hat' summed over this process's rows, float32 [d_out]."""
    counts: Tensor
    """Pairs with a value in this process's rows, by latent, int64 [n_latents]."""
    terms: dict[str, float] = field(default_factory=dict)
    """Further losses by name, weights included."""


def error_of(batch: StepContext, indices: Tensor, values: Tensor, name: str) -> Tensor:
    """Return x_hat' - x' of pairs [batch, w], float32 [batch, d_out], in the named buffer."""
    error = batch.workspace.buffer(name, batch.target)
    if batch.group.latent_part == 0:
        torch.neg(batch.target, out=error)  # b_dec cancels: the target has it subtracted
    else:
        error.zero_()
    batch.sae.kernels.decode(indices, values, batch.sae.W_dec, error)
    return batch.group.sum_latents(error)


def reconstruct(
    batch: StepContext, pairs: Pairs, add: bool = False, slopes: Tensor | None = None
) -> Reconstruction:
    """Return the loss of the configuration, plain or nested, and add its gradients.

    Args:
        pairs: with the slopes of penalties as `extra`.
        add: whether gradients are added to those in the workspace.
        slopes: receives d loss / d v, float32 [batch, w].
    """
    if batch.config.matryoshka:
        return _nested(batch, pairs, add, slopes)
    error = error_of(batch, pairs.indices, pairs.values, "error")
    squared = batch.squares(error)
    slope = error.mul_(batch.error_slope)
    counts = _gradients(batch, pairs, slope, add, slopes)
    loss = squared / (batch.n_rows * batch.total_variance)
    return Reconstruction(loss, squared, slope, slope.sum(0), counts)


def _nested(batch: StepContext, pairs: Pairs, add: bool, slopes: Tensor | None) -> Reconstruction:
    """Return the nested loss.

    A latent is part of every reconstruction of a size above its number, so its gradient comes from
    the sum of their errors. Errors are computed from the smallest size to the largest, and summed
    from the largest back.
    """
    sizes = batch.config.matryoshka
    first, last = batch.group.latents(batch.config.n_latents)
    edges = [min(max(size, first), last) - first for size in (0, *sizes)]  # in local numbers
    levels = []
    for low, high in pairwise(edges):
        within = (pairs.indices >= low) & (pairs.indices < high)
        levels.append(pairs.indices.masked_fill(~within, -1))  # [batch, w]
    errors: list[Tensor] = []
    for number, indices in enumerate(levels):
        own = batch.workspace.buffer(f"error {number}", batch.target)
        own.zero_()
        batch.sae.kernels.decode(indices, pairs.values, batch.sae.W_dec, own)
        batch.group.sum_latents(own)
        errors.append(own.sub_(batch.target) if number == 0 else own.add_(errors[-1]))
    every = [batch.squares(error) for error in errors]
    slope = errors[-1].mul_(batch.error_slope)  # of all latents together
    gradient = batch.workspace.buffer("error", batch.target).zero_()  # summed from the largest back
    counts = torch.zeros(len(batch.sae.W_enc), dtype=torch.int64, device=slope.device)
    part = None if slopes is None else torch.empty_like(slopes)
    for number in reversed(range(len(sizes))):
        share = 1.0 if number == len(sizes) - 1 else batch.error_slope
        gradient.add_(errors[number], alpha=share / len(sizes))
        level = Pairs(levels[number], pairs.values, pairs.gain, pairs.extra)
        counts += _gradients(batch, level, gradient, add or number < len(sizes) - 1, part)
        if slopes is not None and part is not None:
            slopes.copy_(part) if number == len(sizes) - 1 else slopes.add_(part)
    loss = sum(every) / (len(sizes) * batch.n_rows * batch.total_variance)
    return Reconstruction(loss, every[-1], slope, gradient.sum(0), counts)


def widened(batch: StepContext, narrow: Pairs, wide: Pairs, weight: float) -> Reconstruction:
    """Return the loss of Multi-TopK.

    Args:
        narrow: the k largest pairs of each row.
        wide: the 4k largest pairs; a pair in both has the same place in both.
        weight: weight of the loss of `wide`.
    """
    error = error_of(batch, narrow.indices, narrow.values, "error")
    squared = batch.squares(error)
    slope = error.mul_(batch.error_slope)
    other = error_of(batch, wide.indices, wide.values, "wide error")
    wide_squared = batch.squares(other)
    other.mul_(weight * batch.error_slope)
    both = torch.add(slope, other, out=batch.workspace.buffer("both errors", batch.target))
    rest = wide.indices.clone()
    rest[:, : narrow.indices.shape[1]].masked_fill_(narrow.indices >= 0, -1)
    counts = _gradients(batch, narrow, both, False, None)
    _gradients(batch, Pairs(rest, wide.values), other, True, None)
    unit = batch.n_rows * batch.total_variance
    terms = {"multi_topk_loss": weight * wide_squared / unit}
    return Reconstruction(squared / unit, squared, slope, both.sum(0), counts, terms)


def _gradients(
    batch: StepContext, pairs: Pairs, slope: Tensor, add: bool, slopes: Tensor | None
) -> Tensor:
    sae, into = batch.sae, batch.workspace.gradients
    return sae.kernels.gradients(
        pairs, slope, batch.centred, sae.W_dec, into, add=add, slopes=slopes
    )
