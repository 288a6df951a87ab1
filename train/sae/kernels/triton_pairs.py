"""Exact float32 work on pairs of a row and a latent: pre-activations, their order, decoding.

Each kernel gathers rows of a weight (three kilobytes for 768 dimensions) and is limited by memory
bandwidth. Sums have a fixed order, so that results are the same bits each time.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

PAIRS, WIDTH = 16, 256  # pairs and dimensions of a tile
CHUNK = tl.constexpr(32)  # values compared with one value at a time


@triton.jit
def _dots_kernel(
    centred: tl.tensor,
    weight: tl.tensor,
    bias: tl.tensor,
    indices: tl.tensor,
    values: tl.tensor,
    width: tl.tensor,
    d_in: tl.tensor,
    PAIRS: tl.constexpr,
    WIDTH: tl.constexpr,
) -> None:
    """Compute the pre-activations of the pairs of one row, -inf where the index is -1."""
    row = tl.program_id(0).to(tl.int64)
    for first in tl.range(0, width, PAIRS):
        slot = first + tl.arange(0, PAIRS)
        latent = tl.load(indices + row * width + slot, mask=slot < width, other=-1)
        there = latent >= 0
        total = tl.zeros((PAIRS, WIDTH), tl.float32)
        for start in tl.range(0, d_in, WIDTH):
            column = start + tl.arange(0, WIDTH)
            x = tl.load(centred + row * d_in + column, mask=column < d_in, other=0.0)
            w = tl.load(
                weight + latent.to(tl.int64)[:, None] * d_in + column[None, :],
                mask=there[:, None] & (column < d_in)[None, :],
                other=0.0,
            )
            total += w * x[None, :]
        value = tl.sum(total, 1) + tl.load(bias + latent, mask=there, other=0.0)
        value = tl.where(there, value, float("-inf"))
        tl.store(values + row * width + slot, value, mask=slot < width)


@triton.jit
def _sortable(value: tl.tensor, latent: tl.tensor) -> Any:
    """Pack into int64 that order by value, NaN first, and then by latent, the lower first."""
    bits = tl.where(value == 0, 0.0, value).to(tl.int32, bitcast=True)  # -0 becomes 0
    bits = tl.where(value != value, 0x7FFFFFFF, bits ^ ((bits >> 31) & 0x7FFFFFFF))
    return (bits.to(tl.int64) << 32) | (0x7FFFFFFF - latent).to(tl.int64)


@triton.jit
def _largest_kernel(
    candidates: tl.tensor,
    dots: tl.tensor,
    indices: tl.tensor,
    values: tl.tensor,
    count: tl.tensor,
    k: tl.tensor,
    RELU: tl.constexpr,
    ROOM: tl.constexpr,
) -> None:
    """Write the k largest of one row in decreasing order: each value to the place of its rank."""
    row = tl.program_id(0).to(tl.int64)
    slot = tl.arange(0, ROOM)
    latent = tl.load(candidates + row * count + slot, mask=slot < count, other=0)
    value = tl.load(dots + row * count + slot, mask=slot < count, other=0.0)
    mine = _sortable(value, latent)
    rank = tl.zeros((ROOM,), tl.int32)
    for first in tl.range(0, count, CHUNK):
        other = first + tl.arange(0, CHUNK)
        here = other < count
        their_latent = tl.load(candidates + row * count + other, mask=here, other=0)
        their_value = tl.load(dots + row * count + other, mask=here, other=0.0)
        theirs = _sortable(their_value, their_latent)
        ahead = (theirs[None, :] > mine[:, None]) & here[None, :]
        # a row of NaN may hold a latent twice
        twin = (theirs[None, :] == mine[:, None]) & here[None, :] & (other[None, :] < slot[:, None])
        rank += tl.sum((ahead | twin).to(tl.int32), 1)
    if RELU:
        value = tl.where(value < 0, 0.0, value)  # NaN stays
    keep = (slot < count) & (rank < k)
    tl.store(indices + row * k + rank, latent, mask=keep)
    tl.store(values + row * k + rank, value, mask=keep)


@triton.jit
def _decode_kernel(
    indices: tl.tensor,
    values: tl.tensor,
    weight: tl.tensor,
    out: tl.tensor,
    width: tl.tensor,
    d_out: tl.tensor,
    PAIRS: tl.constexpr,
    WIDTH: tl.constexpr,
) -> None:
    """Add one row's sum of weighted rows, for some of the dimensions."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    total = tl.zeros((PAIRS, WIDTH), tl.float32)
    for first in tl.range(0, width, PAIRS):
        slot = first + tl.arange(0, PAIRS)
        latent = tl.load(indices + row * width + slot, mask=slot < width, other=-1)
        value = tl.load(values + row * width + slot, mask=slot < width, other=0.0)
        there = (latent >= 0) & (value != 0)
        w = tl.load(
            weight + latent.to(tl.int64)[:, None] * d_out + column[None, :],
            mask=there[:, None] & (column < d_out)[None, :],
            other=0.0,
        )
        total += tl.where(there, value, 0.0)[:, None] * w
    place = out + row * d_out + column
    before = tl.load(place, mask=column < d_out, other=0.0)
    tl.store(place, before + tl.sum(total, 0), mask=column < d_out)


def pair_dots(centred: Tensor, weight: Tensor, bias: Tensor, indices: Tensor) -> Tensor:
    """`Kernels.preactivations`."""
    values = torch.empty(indices.shape, device=centred.device)
    if indices.numel():
        _dots_kernel[(len(indices),)](
            centred.contiguous(),
            weight.contiguous(),
            bias.contiguous(),
            indices.contiguous(),
            values,
            indices.shape[1],
            centred.shape[1],
            PAIRS=PAIRS,
            WIDTH=WIDTH,
        )
    return values


def largest(candidates: Tensor, dots: Tensor, k: int, relu: bool) -> tuple[Tensor, Tensor]:
    """Find the k largest of dots, float32 [batch, count]: indices int32, values [batch, k]."""
    rows, count = candidates.shape
    indices = torch.empty(rows, k, dtype=torch.int32, device=dots.device)
    values = torch.empty(rows, k, device=dots.device)
    if rows:
        _largest_kernel[(rows,)](
            candidates,
            dots,
            indices,
            values,
            count,
            k,
            RELU=relu,
            ROOM=max(32, triton.next_power_of_2(count)),
        )
    return indices, values


def decode_pairs(indices: Tensor, values: Tensor, weight: Tensor, out: Tensor) -> None:
    """`Kernels.decode`."""
    if indices.numel():
        _decode_kernel[(len(indices), triton.cdiv(out.shape[1], WIDTH))](
            indices.contiguous(),
            values.contiguous(),
            weight.contiguous(),
            out,
            indices.shape[1],
            out.shape[1],
            PAIRS=PAIRS,
            WIDTH=WIDTH,
        )
