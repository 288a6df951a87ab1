"""The Adam step, the rescaling to unit rows and the average of weights in one pass over memory."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from sae_harvest.train.sae.kernels import AdamNumbers

BLOCK = 1024


@triton.jit
def _adam_kernel(
    weight: tl.tensor,
    gradient: tl.tensor,
    first: tl.tensor,
    second: tl.tensor,
    average: tl.tensor,
    size: tl.tensor,
    scale: tl.tensor,
    rate: tl.tensor,
    beta1: tl.tensor,
    rest1: tl.tensor,
    beta2: tl.tensor,
    rest2: tl.tensor,
    root: tl.tensor,
    eps: tl.tensor,
    keep: tl.tensor,
    rest: tl.tensor,
    UNIT: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Do one step on a row of `size` numbers, or on a block of `size` numbers."""
    lane = tl.arange(0, BLOCK)
    if UNIT:
        place = tl.program_id(0).to(tl.int64) * size + lane
        here = lane < size
    else:
        place = tl.program_id(0).to(tl.int64) * BLOCK + lane
        here = place < size
    g = tl.load(gradient + place, mask=here, other=0.0) * scale
    m = beta1 * tl.load(first + place, mask=here, other=0.0) + rest1 * g
    v = beta2 * tl.load(second + place, mask=here, other=0.0) + rest2 * g * g
    tl.store(first + place, m, mask=here)
    tl.store(second + place, v, mask=here)
    p = tl.load(weight + place, mask=here, other=0.0)
    p -= rate * m / (tl.sqrt_rn(v) * root + eps)
    if UNIT:
        p = p / tl.sqrt_rn(tl.sum(tl.where(here, p * p, 0.0), 0))
    tl.store(weight + place, p, mask=here)
    a = tl.load(average + place, mask=here, other=0.0)
    tl.store(average + place, keep * a + rest * p, mask=here)


def adam_step(
    weight: Tensor,
    gradient: Tensor,
    first: Tensor,
    second: Tensor,
    average: Tensor,
    numbers: AdamNumbers,
    unit_rows: bool,
) -> None:
    """`Kernels.adam`."""
    rows, width = weight.shape
    block = max(16, triton.next_power_of_2(width)) if unit_rows else BLOCK
    grid = (rows,) if unit_rows else (triton.cdiv(rows * width, BLOCK),)
    _adam_kernel[grid](
        weight,
        gradient,
        first,
        second,
        average,
        width if unit_rows else rows * width,
        numbers.scale,
        numbers.rate,
        numbers.beta1,
        1 - numbers.beta1,
        numbers.beta2,
        1 - numbers.beta2,
        numbers.root,
        numbers.eps,
        numbers.keep,
        1 - numbers.keep,
        UNIT=unit_rows,
        BLOCK=block,
        num_warps=max(1, min(16, block // 256)),
    )
