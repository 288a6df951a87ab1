"""The sparse pieces of an SAE step, one implementation per device behind one interface.

A step works on pairs of a row and a latent; no kernel makes a [batch, n_latents] float32 tensor.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, Protocol

import torch
from torch import Tensor


@dataclass(frozen=True)
class Pairs:
    """The pairs of a batch: row r has the latents indices[r], which are distinct.

    pi is the pre-activation of a pair, v its value, and P a penalty in the loss. Where the index is
    -1 there is no pair, and the other arrays may hold anything but NaN.
    """

    indices: Tensor
    """int32 [batch, w], latents; -1: no pair."""
    values: Tensor
    """float32 [batch, w], v of each pair."""
    gain: Tensor | None = None
    """float32 [batch, w], dv/dpi; None: 1. Pairs that ReLU set to 0 must then have index -1."""
    extra: Tensor | None = None
    """float32 [batch, w], dP/dpi; None: 0."""

    @classmethod
    def active(cls, indices: Tensor, values: Tensor) -> Pairs:
        """Make pairs from ReLU's output; places with value 0 are no pairs."""
        return cls(indices.masked_fill(values == 0, -1), values)


@dataclass
class Gradients:
    """Gradients of one step. The buffers are reused in every step."""

    enc: Tensor
    """float32 [n_latents, d_in], gradient of the encoder."""
    dec: Tensor
    """float32 [n_latents, d_out], gradient of the decoder, less its part along the decoder row."""
    bias: Tensor
    """float32 [n_latents], gradient of the encoder bias."""
    b_dec: Tensor
    """float32 [d_out], gradient of the decoder bias."""
    squares: Tensor
    """float32 [n_latents], squared norm of a latent's enc and dec together."""

    @classmethod
    def like(cls, weight_enc: Tensor, weight_dec: Tensor) -> Gradients:
        """Allocate zero gradients for weights [n_latents, d_in] and [n_latents, d_out]."""
        n_latents, d_out = weight_dec.shape
        return cls(
            enc=torch.zeros_like(weight_enc),
            dec=torch.zeros_like(weight_dec),
            bias=weight_enc.new_zeros(n_latents),
            b_dec=weight_dec.new_zeros(d_out),
            squares=weight_enc.new_zeros(n_latents),
        )


@dataclass(frozen=True)
class AdamNumbers:
    """The numbers of one Adam step, number t.

    p -= rate * m / (sqrt(v) * root + eps), then average = keep * average + (1 - keep) * p.
    """

    scale: float
    """Factor on the gradient (clipping)."""
    rate: float
    """Learning rate / (1 - beta1^t)."""
    beta1: float
    """Decay of the first moment."""
    beta2: float
    """Decay of the second moment."""
    root: float
    """1 / sqrt(1 - beta2^t)."""
    eps: float
    """Number added to the denominator."""
    keep: float
    """Share of the running average of the weights that stays."""


class Low(Protocol):
    """Encoder weights in low precision, which is enough to choose latents."""

    def rows(self, latents: Tensor) -> Low:
        """Copy some latents, int64 [any]; the copy numbers them from 0."""

    def candidates(self, k: int) -> int:
        """Return the number of latents to choose so that the exact k largest are among them."""


class Kernels(Protocol):
    """The operations that a device's kernels provide.

    Weights are float32 [n_latents, d]; `centred`, float32 [batch, d_in], is the encoder's input;
    `low` is a Low that the same kernels made.

    For the same pairs, the results are the same to the bit each time.
    """

    def low_precision(self, weight: Tensor) -> Low:
        """Convert the weight to the form that `choose` takes."""

    def refresh(self, low: Any, weight: Tensor) -> None:
        """Update the low-precision copy after the weight has changed."""

    def choose(self, centred: Tensor, low: Any, bias: Tensor, count: int) -> Tensor:
        """Choose latents with the largest low-precision pre-activations: int32 [batch, count]."""

    def choose_above(self, centred: Tensor, low: Any, bias: Tensor, floor: Tensor) -> Tensor:
        """Choose the latents whose pre-activation may reach their floor, float32 [n_latents].

        The floor is lowered by the error of low precision, so that latents slightly below it are
        chosen too. A row that is not finite gets latent 0 only, whose exact value shows the fault.

        Returns:
            int32 [batch, w], increasing in each row, then -1; w >= 1 is the most of any row.
        """

    def exact(
        self, centred: Tensor, weight: Tensor, bias: Tensor, candidates: Tensor, k: int, relu: bool
    ) -> tuple[Tensor, Tensor]:
        """Find the k largest exact pre-activations of the candidates, in decreasing order.

        Returns:
            indices int32 [batch, k], values float32 [batch, k]; with `relu`, values >= 0.
        """

    def preactivations(
        self, centred: Tensor, weight: Tensor, bias: Tensor, indices: Tensor
    ) -> Tensor:
        """Compute exact pre-activations of the pairs: float32 [batch, w], -inf without a pair."""

    def decode(self, indices: Tensor, values: Tensor, weight: Tensor, out: Tensor) -> None:
        """Add sum_j values[row, j] weight[indices[row, j]] to out[row]; out float32 [batch, d]."""

    def gradients(
        self,
        pairs: Pairs,
        error: Tensor,
        centred: Tensor,
        weight_dec: Tensor,
        into: Gradients,
        *,
        add: bool,
        decoder: bool = True,
        slopes: Tensor | None = None,
    ) -> Tensor:
        """Compute enc, dec, bias and squares from error = d loss / d reconstruction.

        For each pair: s = error[row] . weight_dec[latent], t = s * gain + extra; then
        enc[latent] += t centred[row], bias[latent] += t and dec[latent] += v error[row]. The part
        of dec along the (unit) row of weight_dec is removed. b_dec does not change.

        Args:
            error: float32 [batch, d_out]. weight_dec: float32 [n_latents, d_out], unit rows.
            add: add to `into`, and do not change latents without pairs; otherwise set all of it.
            decoder: whether pairs give the decoder a gradient.
            slopes: float32 [batch, w], receives s, 0 where there is no pair.

        Returns:
            int64 [n_latents], the number of pairs of each latent that have a value or a gain.
        """

    def latent_sums(self, indices: Tensor, terms: Tensor, n_latents: int) -> Tensor:
        """Sum the pairs' terms, float32 [batch, w], by latent: float32 [n_latents]."""

    def adam(
        self,
        weight: Tensor,
        gradient: Tensor,
        first: Tensor,
        second: Tensor,
        average: Tensor,
        numbers: AdamNumbers,
        unit_rows: bool,
    ) -> None:
        """Do one Adam step in place on [rows, d]; renormalise rows if asked; update the average."""


def kernels_for(device: torch.device) -> Kernels:
    """Return the kernels of a device.

    They are compiled loops on the CPU, Triton kernels on NVIDIA GPUs if Triton is installed, and
    plain torch otherwise.
    """
    if device.type == "cpu":
        from sae_harvest.train.sae.kernels.cpu import CpuKernels

        return CpuKernels()
    if device.type == "cuda" and find_spec("triton") is not None:
        from sae_harvest.train.sae.kernels.triton_ops import TritonKernels

        return TritonKernels(device)
    from sae_harvest.train.sae.kernels.torch_ops import TorchKernels

    return TorchKernels()
