"""The vectors that an ablation subtracts from the rows of one context.

    ablate_row        at the row alone
    ablate_context    at every position of the context at which the latent fires, the row included:
                      earlier positions act on the row through attention, later ones on the tokens
                      after it

At each of these positions p, with z the latent's activation there,

    x_p <- x_p - restore(z W_dec[latent])        without the constant that restore adds

which is the dictionary's output without the latent, plus the dictionary's error on x_p. A channel
as a latent is |x_i - mean_i|, so its ablation sets the channel to its mean.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sae_harvest.train.sae.normalization import restore
from sae_harvest.train.sae.sae import SAE

ABLATE_ROW, ABLATE_CONTEXT = "ablate_row", "ablate_context"
OPERATIONS = (ABLATE_CONTEXT, ABLATE_ROW)  # in the order of the table


@dataclass(frozen=True, eq=False)
class Change:
    """Vectors to add to activations of one context, at one site."""

    position: Tensor
    """int64 [positions], increasing; at least one."""

    vector: Tensor
    """float32 [positions, width], in the units of the model."""

    @property
    def start(self) -> int:
        """First position that changes; the positions before it stay as they are."""
        return int(self.position[0])


@dataclass(frozen=True, eq=False)
class ContextFirings:
    """Activations of a dictionary on the rows of one context."""

    x: Tensor
    """float32 [context_length, d_in], the rows at the site that the dictionary reads, on its
    device like all that follows."""

    indices: Tensor
    """int32 [context_length, w], active latents of each row."""

    values: Tensor
    """float32 [context_length, w], their activations; 0 where there is none."""

    @classmethod
    def of(cls, sae: SAE, x: Tensor, is_read: Tensor) -> ContextFirings:
        """Encode the rows x [context_length, d_in]; none fires where `is_read` is false."""
        x = sae.check_rows(x)
        indices, values = sae.encode(x)
        return cls(x, indices, values.masked_fill(~is_read[:, None].to(values.device), 0.0))

    def active(self, position: int) -> tuple[Tensor, Tensor]:
        """Return the latents that fire at a position and their activations, [active] each."""
        fires = self.values[position] > 0
        return self.indices[position][fires], self.values[position][fires]

    def along(self, latent: int) -> Tensor:
        """Return the activation of a latent at every position, float32 [context_length]."""
        return (self.values * (self.indices == latent)).sum(1)


def ablation(
    sae: SAE, firings: ContextFirings, latent: int, position: int, operation: str, stop: int
) -> Change:
    """Return the change that ablates a latent.

    Args:
        firings: activations of the context; the latent fires at `position`.
        operation: `ablate_row` or `ablate_context`.
        stop: position after the last one whose logits are read; later ones have no effect.
    """
    along = firings.along(latent)[:stop]
    positions = along.nonzero()[:, 0]
    if operation == ABLATE_ROW:
        positions = torch.tensor([position], device=along.device)
    return Change(positions, -written(sae, firings.x[positions], latent, along[positions]))


def random_change(change: Change, direction: Tensor) -> Change:
    """Return a change of the same positions and norms along another direction [width]."""
    norms = torch.linalg.vector_norm(change.vector, dim=1, keepdim=True)  # [positions, 1]
    unit = torch.nn.functional.normalize(direction.to(norms.device), dim=0)
    return Change(change.position, norms * unit)


def written(sae: SAE, x: Tensor, latent: int, values: Tensor) -> Tensor:
    """Return what a latent adds to the dictionary's output on rows, float32 [rows, width_out].

    Args:
        x: the rows at the site that the dictionary reads, [rows, d_in].
        values: the latent's activations, [rows].
    """
    x = sae.check_rows(x)
    vectors = values[:, None] * sae.W_dec[latent]
    # restore is linear except for a constant that it adds to every reconstruction
    return restore(vectors, x, sae.config) - restore(torch.zeros_like(vectors), x, sae.config)
