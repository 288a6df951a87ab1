"""Kernels for the processor: torch for the one large product, compiled loops for the rest."""

from __future__ import annotations

from threading import Lock

import numpy as np
import torch
from torch import Tensor

from train.kernels import AdamNumbers, Gradients
from train.kernels.gradient_jit import adam_rows, decode_rows, latent_gradients, sort_by_latent
from train.kernels.selection_jit import choose_rows, exact_rows

CHUNK_BYTES = 24 << 20  # pre-activations of one chunk stay in the last-level cache
LEAST_ROWS = 64
PARTS = 64  # pieces of the latents, balanced by their pairs, that threads take
ROW_COST = 4  # writing a latent's gradients costs about as much as this many pairs


class CpuKernels:
    """The `Kernels` of the processor. Results are the same bits for any number of threads,
    except for the low-precision product, which only chooses."""

    def __init__(self) -> None:
        self._scratch = torch.empty(0)
        self._lock = Lock()
        # without the instruction, bfloat16 products are emulated and slower than float32
        self._dtype = torch.bfloat16 if torch.cpu._is_avx512_bf16_supported() else torch.float32

    def low_precision(self, weight: Tensor) -> Tensor:
        return weight.to(self._dtype, copy=True)

    def refresh(self, low: Tensor, weight: Tensor) -> None:
        low.copy_(weight)

    def choose(self, centred: Tensor, low: Tensor, bias: Tensor, count: int) -> Tensor:
        rows, n_latents = centred.shape[0], low.shape[0]
        out = torch.empty(rows, count, dtype=torch.int32)
        step = max(LEAST_ROWS, CHUNK_BYTES // (n_latents * low.element_size()))
        with self._lock:
            if self._scratch.numel() < step * n_latents or self._scratch.dtype != low.dtype:
                self._scratch = torch.empty(step * n_latents, dtype=low.dtype)
            for first in range(0, rows, step):
                chunk = centred[first : first + step].to(low.dtype)  # [chunk, d_in]
                scores = self._scratch[: len(chunk) * n_latents].view(len(chunk), n_latents)
                torch.mm(chunk, low.T, out=scores)  # [chunk, n_latents]
                bits = scores.view(torch.int16).numpy()
                if low.dtype == torch.float32:
                    bits = bits[:, 1::2]  # the upper half of a little-endian float32
                choose_rows(bits, bias.numpy(), out[first : first + step].numpy())
        return out

    def exact(
        self, centred: Tensor, weight: Tensor, bias: Tensor, candidates: Tensor, k: int, relu: bool
    ) -> tuple[Tensor, Tensor]:
        indices = torch.empty(len(centred), k, dtype=torch.int32)
        values = torch.empty(len(centred), k)
        exact_rows(
            centred.numpy(),
            weight.numpy(),
            bias.numpy(),
            candidates.numpy(),
            relu,
            indices.numpy(),
            values.numpy(),
        )
        return indices, values

    def decode(self, indices: Tensor, values: Tensor, weight: Tensor, out: Tensor) -> None:
        decode_rows(indices.numpy(), values.numpy(), weight.numpy(), out.numpy())

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
        n_latents = len(weight_dec)
        starts, rows, kept = sort_by_latent(
            indices.numpy(), values.numpy(), not auxiliary, n_latents
        )
        cost = starts + ROW_COST * np.arange(n_latents + 1)
        bounds = np.searchsorted(cost, np.linspace(0, cost[-1], PARTS + 1))
        latent_gradients(
            starts,
            rows,
            kept,
            bounds,
            error.numpy(),
            centred.numpy(),
            weight_dec.numpy(),
            auxiliary,
            into.enc.numpy(),
            into.dec.numpy(),
            into.bias.numpy(),
            into.squares.numpy(),
        )
        return torch.from_numpy(np.diff(starts))

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
        adam_rows(
            weight.numpy(),
            gradient.numpy(),
            first.numpy(),
            second.numpy(),
            average.numpy(),
            np.array(
                [
                    numbers.scale,
                    numbers.rate,
                    numbers.beta1,
                    numbers.beta2,
                    numbers.root,
                    numbers.eps,
                    numbers.keep,
                ],
                np.float32,
            ),
            unit_rows,
        )
