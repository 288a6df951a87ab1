"""The sparse pieces of an SAE step, one implementation per device behind one interface.

A batch's latents are pairs (indices int32 [batch, k], values float32 [batch, k]); nothing here
makes a [batch, n_latents] float32 tensor. `train.kernels.oracle` has the dense formulas.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


@dataclass
class Gradients:
    """Gradients of one step; buffers are kept from step to step.

    enc, dec: float32 [n_latents, d_in], dec without its part along the decoder row;
    bias: float32 [n_latents]; b_dec: float32 [d_in];
    squares: float32 [n_latents], squared norm of a latent's enc, dec and bias together.
    """

    enc: Tensor
    dec: Tensor
    bias: Tensor
    b_dec: Tensor
    squares: Tensor

    @classmethod
    def like(cls, weight: Tensor) -> Gradients:
        """Zero gradients for weights [n_latents, d_in]."""
        n_latents, d_in = weight.shape
        return cls(
            enc=torch.zeros_like(weight),
            dec=torch.zeros_like(weight),
            bias=weight.new_zeros(n_latents),
            b_dec=weight.new_zeros(d_in),
            squares=weight.new_zeros(n_latents),
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


class Kernels(Protocol):
    """What a device offers. Batches are float32 [batch, d_in], weights [n_latents, d_in]."""

    def low_precision(self, weight: Tensor) -> Tensor:
        """A copy of the weight for `choose`, [n_latents, d_in] in the device's fast dtype."""

    def refresh(self, low: Tensor, weight: Tensor) -> None:
        """Copies the weight into its low-precision copy again."""

    def choose(self, centred: Tensor, low: Tensor, bias: Tensor, count: int) -> Tensor:
        """Where low-precision pre-activations are largest: int32 [batch, count], distinct."""

    def exact(
        self, centred: Tensor, weight: Tensor, bias: Tensor, candidates: Tensor, k: int, relu: bool
    ) -> tuple[Tensor, Tensor]:
        """The k largest exact pre-activations of the candidates, in decreasing order.

        Returns:
            indices int32 [batch, k], values float32 [batch, k]; with `relu`, values >= 0.
        """

    def decode(self, indices: Tensor, values: Tensor, weight: Tensor, out: Tensor) -> None:
        """out[row] += sum_j values[row, j] weight[indices[row, j]]; out float32 [batch, d_in]."""

    def gradients(
        self,
        indices: Tensor,
        values: Tensor,
        error: Tensor,
        centred: Tensor,
        weight_dec: Tensor,
        into: Gradients,
        auxiliary: bool,
    ) -> Tensor:
        """Gradients of enc, dec, bias and squares from error = d loss / d reconstruction.

        The main latents set all of `into` and skip values of zero, which ReLU cut; auxiliary
        ones are added to it and never cut. b_dec is left alone.

        Returns:
            int64 [n_latents], how many rows each latent took part in.
        """

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
    """The kernels of a device: compiled loops on the processor, plain torch elsewhere."""
    if device.type == "cpu":
        from train.kernels.cpu import CpuKernels

        return CpuKernels()
    from train.kernels.torch_ops import TorchKernels

    return TorchKernels()
