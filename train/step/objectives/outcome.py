"""The result of an objective, besides the gradients in the workspace."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from sae_harvest.train.step.reconstruction import Reconstruction
from sae_harvest.train.step.step_context import StepContext


@dataclass
class Outcome:
    """The result of an objective."""

    reconstruction: Reconstruction
    """Losses and slopes of the reconstruction."""
    penalties: dict[str, float]
    """Penalties by name, weights included."""
    pulls: Tensor
    """Sum over this process's pairs of d loss / d pi, float32 [n_latents].

    It reaches b_dec through the encoder. Mostly it is the gradient of b_enc."""
    least_kept: float | None = None
    """The least value that batchtopk kept, 0 if it cut none off; None for other objectives."""


def outcome(batch: StepContext, reconstruction: Reconstruction, **penalties: float) -> Outcome:
    """Return the result of an objective with the same gradient of pairs for b_enc and b_dec."""
    return Outcome(reconstruction, penalties, batch.workspace.gradients.bias)
