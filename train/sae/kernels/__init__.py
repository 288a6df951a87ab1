"""The sparse pieces of an SAE step, one implementation per device behind one interface.

What a step works on are pairs of a row and a latent; nothing here makes a [batch, n_latents]
float32 tensor.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, Protocol

import torch
from torch import Tensor


@dataclass(frozen=True)
class Pairs:
    """The pairs of a batch: row r has latents indices[r], distinct; -1 is no pair.

    With pi the pre-activation of a pair, v its value and P a penalty in the loss:

    indices: int32 [batch, w]; values: float32 [batch, w], v.
    gain: float32 [batch, w], dv/dpi; none: 1, so that a pair which ReLU cut must be no pair.
    extra: float32 [batch, w], dP/dpi; none: 0.
    What stands at a place without a pair doesn't matter, NaN excepted.
    """

    indices: Tensor
    values: Tensor
    gain: Tensor | None = None
    extra: Tensor | None = None

    @classmethod
    def active(cls, indices: Tensor, values: Tensor) -> Pairs:
        """Pairs of ReLU's output: those with value 0 are none."""
        return cls(indices.masked_fill(values == 0, -1), values)


@dataclass
class Gradients:
    """Gradients of one step; buffers are kept from step to step.

    enc: float32 [n_latents, d_in]; dec: float32 [n_latents, d_out], without its part along the
    decoder row; bias: float32 [n_latents]; b_dec: float32 [d_out];
    squares: float32 [n_latents], squared norm of a latent's enc and dec together.
    """

    enc: Tensor
    dec: Tensor
    bias: Tensor
    b_dec: Tensor
    squares: Tensor

    @classmethod
    def like(cls, weight_enc: Tensor, weight_dec: Tensor) -> Gradients:
        """Zero gradients for weights [n_latents, d_in] and [n_latents, d_out]."""
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
    """One Adam step: p -= rate * m / (sqrt(v) * root + eps), then average = keep * average + ...

    scale: factor on the gradient (clipping); rate: learning rate / (1 - beta1^t);
    root: 1 / sqrt(1 - beta2^t); keep: share of the running average of weights that stays.
    """

    scale: float
    rate: float
    beta1: float
    beta2: float
    root: float
    eps: float
    keep: float


class Low(Protocol):
    """Encoder weights in low precision, which is enough to choose latents."""

    def rows(self, latents: Tensor) -> Low:
        """A copy for some latents, int64 [any]; they are numbered from 0 in it."""

    def candidates(self, k: int) -> int:
        """The number of latents to choose so that the exact k largest are among them."""


class Kernels(Protocol):
    """The operations that a device's kernels provide.

    Weights are float32 [n_latents, d], `centred` float32 [batch, d_in] is what the encoder sees,
    `low` a Low that the same kernels made.
    Given the chosen pairs, results are the same bits each time.
    """

    def low_precision(self, weight: Tensor) -> Low:
        """The weight in the form that `choose` takes."""

    def refresh(self, low: Any, weight: Tensor) -> None:
        """Copies the weight into its low-precision copy again."""

    def choose(self, centred: Tensor, low: Any, bias: Tensor, count: int) -> Tensor:
        """Latents with the largest low-precision pre-activations: int32 [batch, count]."""

    def choose_above(self, centred: Tensor, low: Any, bias: Tensor, floor: Tensor) -> Tensor:
        """The latents whose pre-activation may reach their floor, which is float32 [n_latents].

        The error of low precision is taken off the floor: those slightly below are there too.
        A row that is not finite has latent 0 only, whose exact value will show it.

        Returns:
            int32 [batch, w], increasing in a row, -1 after the last; w >= 1 is the most of a row.
        """

    def exact(
        self, centred: Tensor, weight: Tensor, bias: Tensor, candidates: Tensor, k: int, relu: bool
    ) -> tuple[Tensor, Tensor]:
        """The k largest exact pre-activations of the candidates, in decreasing order.

        Returns:
            indices int32 [batch, k], values float32 [batch, k]; with `relu`, values >= 0.
        """

    def preactivations(
        self, centred: Tensor, weight: Tensor, bias: Tensor, indices: Tensor
    ) -> Tensor:
        """Exact pre-activations of the pairs: float32 [batch, w], -inf where there is none."""

    def decode(self, indices: Tensor, values: Tensor, weight: Tensor, out: Tensor) -> None:
        """out[row] += sum_j values[row, j] weight[indices[row, j]]; out float32 [batch, d]."""

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
        """Gradients of enc, dec, bias and squares from error = d loss / d reconstruction.

        For each pair: s = error[row] . weight_dec[latent], t = s * gain + extra; then
        enc[latent] += t centred[row], bias[latent] += t and dec[latent] += v error[row], of
        which the part along the (unit) row of weight_dec is taken off. b_dec is left alone.

        Args:
            error: float32 [batch, d_out]. weight_dec: float32 [n_latents, d_out], unit rows.
            add: adds to `into` and leaves other latents alone; otherwise all of it is set.
            decoder: whether pairs give the decoder a gradient.
            slopes: float32 [batch, w], is set to s, 0 where there is no pair.

        Returns:
            int64 [n_latents], pairs of each latent that have a value or a gain.
        """

    def latent_sums(self, indices: Tensor, terms: Tensor, n_latents: int) -> Tensor:
        """Sums of the pairs' terms, float32 [batch, w], by latent: float32 [n_latents]."""

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
        """One Adam step in place on [rows, d]; renormalises rows if asked; then averages."""


def kernels_for(device: torch.device) -> Kernels:
    """The kernels of a device: compiled loops on the processor, Triton's on NVIDIA GPUs where it is
    installed, plain torch elsewhere."""
    if device.type == "cpu":
        from sae_harvest.train.sae.kernels.cpu import CpuKernels

        return CpuKernels()
    if device.type == "cuda" and find_spec("triton") is not None:
        from sae_harvest.train.sae.kernels.triton_ops import TritonKernels

        return TritonKernels(device)
    from sae_harvest.train.sae.kernels.torch_ops import TorchKernels

    return TorchKernels()
