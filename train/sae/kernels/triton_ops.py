"""The `Kernels` of NVIDIA GPUs."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from sae_harvest.train.sae.kernels import AdamNumbers, Gradients, Pairs
from sae_harvest.train.sae.kernels.triton_adam import adam_step
from sae_harvest.train.sae.kernels.triton_gradients import gradients_by_latent
from sae_harvest.train.sae.kernels.triton_low import GroupedLow, shorten
from sae_harvest.train.sae.kernels.triton_pairs import decode_pairs, largest, pair_dots
from sae_harvest.train.sae.kernels.triton_reaching import choose_reaching
from sae_harvest.train.sae.kernels.triton_select import (
    choose_by_groups,
    choose_by_rows,
    group_choice_pays,
)
from sae_harvest.train.sae.kernels.triton_sort import sum_by_latent

FP8_CAPABILITY = (8, 9)  # the first compute capability with e4m3


class TritonKernels:
    """The `Kernels` of one GPU, or of the CPU under Triton's interpreter.

    Args:
        device: the device of all tensors.
        fp8: choose latents by e4m3 products instead of bfloat16 ones: twice as fast, with more
            candidates because the error is larger. None: if the device has e4m3.
    """

    def __init__(self, device: torch.device, fp8: bool | None = None) -> None:
        self._device = device
        if fp8 is None:
            fp8 = (
                device.type == "cuda" and torch.cuda.get_device_capability(device) >= FP8_CAPABILITY
            )
        self._fp8 = fp8

    def _here(self) -> AbstractContextManager[object]:
        """Make the device current: Triton launches go there, whatever device the tensors are on."""
        return torch.cuda.device(self._device) if self._device.type == "cuda" else nullcontext()

    def low_precision(self, weight: Tensor) -> GroupedLow:
        low = GroupedLow(len(weight), weight.shape[1], self._fp8, weight.device)
        low.refresh(weight)
        return low

    def refresh(self, low: GroupedLow, weight: Tensor) -> None:
        low.refresh(weight)

    def choose(self, centred: Tensor, low: GroupedLow, bias: Tensor, count: int) -> Tensor:
        by_groups = group_choice_pays(low, count)
        with self._here():
            short, scale = shorten(centred, low.fp8)
            choose = choose_by_groups if by_groups else choose_by_rows
            return choose(short, scale, low, bias, count)

    def choose_above(self, centred: Tensor, low: GroupedLow, bias: Tensor, floor: Tensor) -> Tensor:
        finite = centred.isfinite().all(1)  # [batch]
        with self._here():
            short, scale = shorten(centred, low.fp8)
            return choose_reaching(short, scale, low, bias - floor, low.doubt(centred), finite)

    def exact(
        self, centred: Tensor, weight: Tensor, bias: Tensor, candidates: Tensor, k: int, relu: bool
    ) -> tuple[Tensor, Tensor]:
        with self._here():
            candidates = candidates.contiguous()
            dots = pair_dots(centred, weight, bias, candidates)  # [batch, count]
            return largest(candidates, dots, k, relu)

    def preactivations(
        self, centred: Tensor, weight: Tensor, bias: Tensor, indices: Tensor
    ) -> Tensor:
        with self._here():
            return pair_dots(centred, weight, bias, indices)

    def decode(self, indices: Tensor, values: Tensor, weight: Tensor, out: Tensor) -> None:
        with self._here():
            decode_pairs(indices, values, weight, out)

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
        with self._here():
            return gradients_by_latent(
                pairs, error, centred, weight_dec, into, add, decoder, slopes
            )

    def latent_sums(self, indices: Tensor, terms: Tensor, n_latents: int) -> Tensor:
        with self._here():
            return sum_by_latent(indices, terms, n_latents)

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
        with self._here():
            adam_step(weight, gradient, first, second, average, numbers, unit_rows)
