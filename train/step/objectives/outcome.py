"""The result of an objective, beside the gradients in the workspace."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from sae_harvest.train.step.reconstruction import Reconstruction
from sae_harvest.train.step.step_context import StepContext


@dataclass
class Outcome:
    """reconstruction: its losses and slopes. penalties: by name, weights included.

    pulls: float32 [n_latents], sum over pairs of d loss / d pi, of this process's rows: what
    reaches b_dec through the encoder. Mostly the gradient of b_enc.
    least_kept: the least value that batchtopk kept, 0 if it cut none off.
    """

    reconstruction: Reconstruction
    penalties: dict[str, float]
    pulls: Tensor
    least_kept: float | None = None


def outcome(batch: StepContext, reconstruction: Reconstruction, **penalties: float) -> Outcome:
    """Return the result of an objective whose pairs have the same gradient for b_enc and b_dec."""
    return Outcome(reconstruction, penalties, batch.workspace.gradients.bias)
