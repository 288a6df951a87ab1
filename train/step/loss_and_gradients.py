"""Losses and gradients of one batch, with sparse latents throughout."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from sae_harvest.train.config import TrainConfig
from sae_harvest.train.parallel.process_group import ProcessGroup
from sae_harvest.train.sae.normalization import normalise_target
from sae_harvest.train.sae.sae import SAE
from sae_harvest.train.step.auxiliary import add_auxiliary
from sae_harvest.train.step.objectives import OBJECTIVES
from sae_harvest.train.step.step_context import StepContext, Workspace

__all__ = ["StepResult", "Workspace", "train_step"]


@dataclass(frozen=True)
class StepResult:
    """Losses and counts of one batch, over all processes; the gradients are in the workspace."""

    loss: float
    """Squared error per row over the data's total variance (nested: the mean over sizes)."""
    penalties: dict[str, float]
    """Further losses by name, weights included."""
    auxk: float
    """The AuxK loss, its weight included."""
    fvu: float
    """Squared error over the batch's own variance."""
    l0: float
    """Active latents per row."""
    fired: Tensor
    """This process's latents that fired, bool [n_latents]."""
    grad_norm: float
    """Norm of the whole gradient before clipping."""
    least_kept: float | None
    """The least value that batchtopk kept, 0 if it cut none off; None for other objectives."""

    @property
    def total(self) -> float:
        """The total loss that is differentiated."""
        return self.loss + self.auxk + sum(self.penalties.values())


def train_step(
    sae: SAE,
    x: Tensor,
    config: TrainConfig,
    total_variance: float,
    dead: Tensor,
    workspace: Workspace,
    step: int = 0,
    target: Tensor | None = None,
    group: ProcessGroup | None = None,
) -> StepResult:
    """Compute the gradients of all losses at one batch, and return losses and counts.

    Args:
        sae: the SAE; it is not changed.
        x: float32 [batch, d_in], this process's rows.
        config: the losses and their weights.
        total_variance: variance of the normalised target, summed over dimensions.
        dead: the dead latents, bool [n_latents].
        workspace: receives the gradients.
        step: number of earlier steps, for penalties that grow.
        target: rows of a transcoder's target site, float32 [batch, d_out].
        group: the processes that share this step; None for this process alone.
    """
    group = group or ProcessGroup()
    batch = _prepare(sae, x, config, total_variance, workspace, step, target, group)
    workspace.extra.clear()
    result = OBJECTIVES[config.activation](batch)
    reconstruction, into = result.reconstruction, workspace.gradients
    spread = batch.spread(batch.target, batch.squares(batch.target))
    into.b_dec = reconstruction.decoder_slope
    if not sae.config.is_transcoder:
        # the encoder subtracts b_dec from its input; AuxK, added later, has no gradient for it
        into.b_dec = into.b_dec - group.sum_latents(result.pulls @ sae.W_enc)
    group.sum_rows(into.b_dec)
    counts = group.sum_rows(reconstruction.counts)
    auxk = add_auxiliary(batch, reconstruction.slope, dead)
    group.reduce_gradients(into)
    own = into.squares.double().sum() + into.bias.double().square().sum()
    for extra in workspace.extra.values():
        own += extra.double().square().sum()
    square = group.sum_latents(own) + into.b_dec.double().square().sum()
    return StepResult(
        loss=reconstruction.loss,
        penalties=reconstruction.terms | result.penalties,
        auxk=auxk,
        fvu=reconstruction.squared / spread if spread > 0 else 0.0,
        l0=float(group.sum_latents(counts.sum())) / batch.n_rows,
        fired=counts > 0,
        grad_norm=float(square.sqrt()),
        least_kept=result.least_kept,
    )


def _prepare(
    sae: SAE,
    x: Tensor,
    config: TrainConfig,
    total_variance: float,
    workspace: Workspace,
    step: int,
    target: Tensor | None,
    group: ProcessGroup,
) -> StepContext:
    centred = sae.centre(x, out=workspace.buffer("centred", x))  # [batch, d_in]
    wanted = centred
    if target is not None:
        wanted = normalise_target(target.to(sae.device), sae.config) - sae.b_dec  # [batch, d_out]
    return StepContext(
        sae=sae,
        config=config,
        group=group,
        workspace=workspace,
        centred=centred,
        target=wanted,
        n_rows=len(x) * group.row_parts,
        total_variance=total_variance,
        penalty_share=config.penalty_factor_at(step),
    )
