"""The values of one batch during a training step, and its buffers."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sae_harvest.common.errors import RunError
from sae_harvest.train.config import TrainConfig
from sae_harvest.train.parallel.process_group import ProcessGroup
from sae_harvest.train.sae.kernels import Gradients
from sae_harvest.train.sae.sae import SAE

ROUNDING = 1e-5  # share of a sum of squares below which its spread is float32 rounding
DENSE_PAIRS = 512  # active latents per row that are always few enough
DENSE_SHARE = 1 / 8  # largest share of active latents per row, if that is more


class Workspace:
    """Gradients and batch-sized buffers, kept between steps: fresh pages cost a third more time.

    Attributes:
        gradients: gradients of W_enc, W_dec, b_enc and b_dec.
        extra: name → gradient of other trained tensors, float32 [n_latents]; `threshold` is that
            of the logarithm of thresholds.
    """

    def __init__(self, sae: SAE, batch_rows: int) -> None:
        self.gradients = Gradients.like(sae.W_enc, sae.W_dec)
        self.extra: dict[str, Tensor] = {}
        self._rows = batch_rows
        self._buffers: dict[str, Tensor] = {}

    def buffer(self, name: str, like: Tensor) -> Tensor:
        """Return a float32 tensor of the shape of `like`, [batch, d], with any content."""
        if name not in self._buffers:
            rows = max(self._rows, len(like))
            self._buffers[name] = like.new_empty(rows, like.shape[1], dtype=torch.float32)
        return self._buffers[name][: len(like)]


@dataclass(frozen=True)
class StepContext:
    """Values that the parts of a step share."""

    sae: SAE
    """The SAE, or this process's part of it."""
    config: TrainConfig
    """The configuration of the run."""
    group: ProcessGroup
    """The processes that share the step."""
    workspace: Workspace
    """Gradients and buffers."""
    centred: Tensor
    """Input of the encoder, float32 [batch, d_in]."""
    target: Tensor
    """Normalised target minus b_dec, float32 [batch, d_out]; for an SAE the same as `centred`."""
    n_rows: int
    """Rows of all processes."""
    total_variance: float
    """Variance of the normalised target, summed over dimensions."""
    penalty_share: float
    """Factor of l1, kl or l0 in this step."""

    @property
    def error_slope(self) -> float:
        """Factor c: d loss / d error = c error, for |error|^2 / (n_rows total_variance)."""
        return 2 / (self.n_rows * self.total_variance)

    def squares(self, rows: Tensor) -> float:
        """Sum of squares of float32 [batch, d] over all processes' rows; in float64 across rows."""
        total = torch.linalg.vector_norm(rows, dim=1).double().square().sum()
        return float(self.group.sum_rows(total))

    def spread(self, rows: Tensor, squares: float) -> float:
        """Sum over rows of the squared distance to the mean row, 0 if that is within rounding."""
        total = self.group.sum_rows(rows.mean(0).double() * len(rows))  # [d]
        spread = squares - float(total.square().sum()) / self.n_rows
        return spread if spread > ROUNDING * squares else 0.0

    def total(self, terms: Tensor) -> float:
        """Sum of per-pair terms [batch, w] over all processes' rows and latents, in float64."""
        total = terms.sum(dtype=torch.float64)
        return float(self.group.sum_latents(self.group.sum_rows(total)))

    def latent_sums(self, indices: Tensor, terms: Tensor) -> Tensor:
        """Sum of per-pair terms [batch, w] by latent over all processes' rows, [n_latents]."""
        sums = self.sae.kernels.latent_sums(indices, terms, len(self.sae.W_enc))
        return self.group.sum_rows(sums)

    def above(self, floor: Tensor) -> tuple[Tensor, Tensor]:
        """Return the pairs with a pre-activation above their latent's floor, float32 [n_latents].

        Returns:
            indices: int32 [batch, w], -1 for none; pi: float32 [batch, w], -inf for none.

        Raises:
            RunError: too many pairs to compute with.
        """
        sae = self.sae
        indices = sae.kernels.choose_above(self.centred, sae.low, sae.b_enc, floor)  # [batch, w]
        pi = sae.kernels.preactivations(self.centred, sae.W_enc, sae.b_enc, indices)
        below = pi <= floor[indices.clamp(min=0)]  # NaN is kept, so that the loss shows it
        active = self.total(~below) / self.n_rows
        if active > max(DENSE_PAIRS, DENSE_SHARE * self.config.n_latents):
            raise RunError(
                f"{active:,.0f} of {self.config.n_latents:,} latents are active per row, too many "
                f"to compute with; raise the penalty of {self.config.activation} or lower --lr."
            )
        return indices.masked_fill(below, -1), pi.masked_fill(below, -torch.inf)
