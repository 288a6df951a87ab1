"""The latents that may reach their floor, listed from the bits that `triton_scores` writes."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sae_harvest.train.sae.kernels.triton_low import GroupedLow
from sae_harvest.train.sae.kernels.triton_scores import reaching

WORDS_BYTES = 1 << 30  # size of the words of one chunk of rows
WORDS = 1024  # words that one program reads at a time


@triton.jit
def _count_kernel(
    words: tl.tensor, counts: tl.tensor, groups: tl.tensor, WIDTH: tl.constexpr
) -> None:
    """Count the bits that are set in a row's words."""
    row = tl.program_id(0).to(tl.int64)
    total = tl.zeros((WIDTH,), tl.int32)
    for first in tl.range(0, groups, WIDTH):
        place = first + tl.arange(0, WIDTH)
        word = tl.load(words + row * groups + place, mask=place < groups, other=0)
        total += _bits_set(word)
    tl.store(counts + row, tl.sum(total, 0))


@triton.jit
def _bits_set(word: tl.tensor) -> Any:
    bits = word.to(tl.uint32, bitcast=True)
    bits = bits - ((bits >> 1) & 0x55555555)
    bits = (bits & 0x33333333) + ((bits >> 2) & 0x33333333)
    bits = (bits + (bits >> 4)) & 0x0F0F0F0F
    return ((bits + (bits >> 8) + (bits >> 16) + (bits >> 24)) & 0x3F).to(tl.int32)


@triton.jit
def _list_kernel(
    words: tl.tensor, out: tl.tensor, groups: tl.tensor, room: tl.tensor, WIDTH: tl.constexpr
) -> None:
    """List the latents of a row's bits, in the order of groups; later places don't change."""
    row = tl.program_id(0).to(tl.int64)
    taken = 0
    for first in tl.range(0, groups, WIDTH):
        place = first + tl.arange(0, WIDTH)
        word = tl.load(words + row * groups + place, mask=place < groups, other=0)
        number = _bits_set(word)
        slot = taken + tl.cumsum(number, 0) - number
        taken += tl.sum(number, 0)
        for _ in tl.range(0, tl.max(number, 0)):
            lowest = word & -word
            # a power of two is exact as a float; its exponent is the member
            exact = lowest.to(tl.uint32, bitcast=True).to(tl.float32)
            member = (exact.to(tl.int32, bitcast=True) >> 23) - 127
            tl.store(out + row * room + slot, member * groups + place, mask=word != 0)
            slot += 1
            word = word & (word - 1)


def choose_reaching(
    short: Tensor, scale: Tensor, low: GroupedLow, height: Tensor, doubt: Tensor, finite: Tensor
) -> Tensor:
    """List latents with scores that may reach the floor: int32 [rows, most], increasing, then -1.

    Args:
        short, scale, height, doubt: as in `triton_scores.reaching`.
        finite: bool [rows]; a row that is not finite gets latent 0 only.
    """
    step = max(128, WORDS_BYTES // (4 * low.groups) // 128 * 128)
    inverse = scale.reciprocal()
    parts = []
    for first in range(0, len(short), step):
        part = slice(first, first + step)
        rows = len(short[part])
        words = reaching(short[part], inverse[part], low, height, doubt[part])[:rows]
        words.masked_fill_(~finite[part].unsqueeze(1), 0)
        words[:, 0].masked_fill_(~finite[part], 1)
        counts = torch.empty(rows, dtype=torch.int32, device=short.device)
        _count_kernel[(rows,)](words, counts, low.groups, WIDTH=WORDS)
        most = max(1, int(counts.max()))
        listed = torch.full((rows, most), low.n_latents, dtype=torch.int32, device=short.device)
        _list_kernel[(rows,)](words, listed, low.groups, most, WIDTH=WORDS)
        listed = listed.sort(dim=1).values
        parts.append(listed.masked_fill_(listed == low.n_latents, -1))
    width = max((part.shape[1] for part in parts), default=1)
    if not parts:
        return torch.empty(0, 1, dtype=torch.int32, device=short.device)
    return torch.cat(
        [torch.nn.functional.pad(part, (0, width - part.shape[1]), value=-1) for part in parts]
    )
