"""The one large product on the GPU, fused with the summary of its scores.

`scores = centred @ low^T + bias` would be [batch, n_latents]. Each program computes one tile of it
on the tensor cores and writes only a summary: the two largest scores of each group of 32 latents,
or one bit per score that says whether it reaches its floor. `train.sae.kernels.triton_low` defines
the layout.

Keys are int32: the bits of a float32 score, changed so that integers have the same order, with the
last five bits replaced by 31 - member. Keys of a group are distinct. NaN is above infinity, so that
it is chosen and seen. Of equal scores, the lower latent has the larger key.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from sae_harvest.train.sae.kernels.triton_low import GroupedLow

ROW_STEP = 128  # the number of output rows is rounded up to a multiple
TILE_BYTES = 128  # depth of a tile: the span of the shared memory's swizzle
MIN_KEY = tl.constexpr(-(2**31))
MIN_SPREAD = 1e-30  # the spread of a latent of zeros
# The interpreter multiplies the bits of bfloat16 as integers; in float32 the products are exact.
INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))


@dataclass(frozen=True)
class Tile:
    """The scores that one program computes, and its resources."""

    rows: int
    """Rows of the tile."""
    columns: int
    """Positions of the tile."""
    warps: int
    """Warps of the program."""
    stages: int
    """Steps by which loads run ahead."""

    def arguments(self, rows: Tensor, low: GroupedLow) -> tuple[Any, dict[str, Any]]:
        """Return the grid, and the keyword arguments of both kernels."""
        grid = (triton.cdiv(len(rows), self.rows) * (len(low.values) // self.columns),)
        return grid, {
            "COPY_ENGINE": has_copy_engine(rows.device),
            "DEPTH": rows.shape[1],
            "STEP": TILE_BYTES // rows.element_size(),
            "ROWS": self.rows,
            "COLUMNS": self.columns,
            "num_warps": self.warps,
            "num_stages": self.stages,
        }

    def factors(self, rows: Tensor, low: GroupedLow) -> tuple[Any, Any]:
        """Return both factors, as descriptors for the copy engine if there is one."""
        if not has_copy_engine(rows.device):
            return rows, low.values
        depth = TILE_BYTES // rows.element_size()
        return (
            TensorDescriptor.from_tensor(rows, [self.rows, depth]),
            TensorDescriptor.from_tensor(low.values, [self.columns, depth]),
        )


def has_copy_engine(device: torch.device) -> bool:
    """Whether tiles can be copied by descriptor: on Hopper and later, and in the interpreter."""
    return device.type == "cpu" or torch.cuda.get_device_capability(device) >= (9, 0)


# Two programs with the first tile fit on one multiprocessor: one reduces its scores while the other
# multiplies. Larger tiles read less, but only one program fits. `bench.gpu` times all of them.
TILES = (Tile(128, 128, 4, 3), Tile(128, 256, 8, 3), Tile(128, 256, 8, 4), Tile(64, 256, 4, 2))
TILE = Tile(16, 128, 1, 1) if INTERPRETED else TILES[0]


@triton.jit
def ordered(score: tl.tensor) -> Any:
    """Convert float32 scores to int32 with the same order, NaN above all."""
    bits = score.to(tl.int32, bitcast=True)
    if INTERPRETED:  # the GPU's sums give only positive NaN
        bits = tl.where(score != score, 0x7FFFFFFF, bits)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _two_largest(keys: tl.tensor) -> Any:
    """Find the two largest along axis 2 of int32 [a, b, 32, c]: [a, b, c, 2], for distinct keys."""
    largest = tl.max(keys, axis=2)
    # difference to the largest, modulo 2^32: greater for nearer keys, and 0 for the largest itself
    below = (keys - largest[:, :, None, :]).to(tl.uint32, bitcast=True)
    second = largest + tl.max(below, axis=2).to(tl.int32, bitcast=True)
    return tl.join(largest, second)


@triton.jit
def _tile(row_tiles: tl.tensor, groups: tl.tensor, COLUMNS: tl.constexpr) -> Any:
    """Choose a program's tile such that 16 tiles of rows share a tile of latents in the cache."""
    column_tiles = groups // (COLUMNS // 32)
    sweep = tl.program_id(0) // (16 * column_tiles)
    place = tl.program_id(0) % (16 * column_tiles)
    tall = tl.minimum(row_tiles - sweep * 16, 16)
    return sweep * 16 + place % tall, place // tall


@triton.jit
def _product(
    centred: tl.tensor,
    low: tl.tensor,
    first_row: tl.tensor,
    first_column: tl.tensor,
    rows: tl.tensor,
    COPY_ENGINE: tl.constexpr,
    DEPTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STEP: tl.constexpr,
) -> Any:
    """Compute one tile of centred @ low^T, float32 [ROWS, COLUMNS]."""
    scores = tl.zeros((ROWS, COLUMNS), tl.float32)
    if not COPY_ENGINE:  # rows past the last repeat it; their results are not read
        row = tl.minimum(first_row + tl.arange(0, ROWS), rows - 1).to(tl.int64)
        column = (first_column + tl.arange(0, COLUMNS)).to(tl.int64)
        lane = tl.arange(0, STEP)
        centred += row[:, None] * DEPTH + lane[None, :]
        low += column[:, None] * DEPTH + lane[None, :]
    for first in tl.range(0, DEPTH, STEP):
        if COPY_ENGINE:
            x = centred.load([first_row, first])  # [ROWS, STEP]
            w = low.load([first_column, first])  # [COLUMNS, STEP]
        else:
            x, w = tl.load(centred + first), tl.load(low + first)
        if INTERPRETED:
            x, w = x.to(tl.float32), w.to(tl.float32)
        scores = tl.dot(x, w.T, scores)
    return scores


@triton.jit
def group_maxima_kernel(
    centred: tl.tensor,
    low: tl.tensor,
    inverse: tl.tensor,
    scales: tl.tensor,
    offsets: tl.tensor,
    keys: tl.tensor,
    groups: tl.tensor,
    rows: tl.tensor,
    FP8: tl.constexpr,
    COPY_ENGINE: tl.constexpr,
    DEPTH: tl.constexpr,
    STEP: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    row_tile, tile = _tile(tl.cdiv(rows, ROWS), groups, COLUMNS)
    scores = _product(
        centred, low, row_tile * ROWS, tile * COLUMNS, rows, COPY_ENGINE, DEPTH, ROWS, COLUMNS, STEP
    )  # [ROWS, COLUMNS]
    row = row_tile * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    offset = tl.load(offsets + tile * COLUMNS + column)
    if FP8:  # scores divided by the row's scale, which keeps their order
        scale = tl.load(scales + tile * COLUMNS + column)
        share = tl.load(inverse + row, mask=row < rows, other=1.0)
        scores = scores * scale[None, :] + offset[None, :] * share[:, None]
    else:
        scores += offset[None, :]
    key = (ordered(scores) & -32) | (31 - column % 128 // 4)[None, :]  # [ROWS, COLUMNS]
    two = _two_largest(tl.reshape(key, [ROWS, COLUMNS // 128, 32, 4]))
    place = tile * (COLUMNS // 16) + tl.arange(0, COLUMNS // 16)
    start = row.to(tl.int64) * (2 * groups)
    tl.store(keys + start[:, None] + place[None, :], tl.reshape(two, [ROWS, COLUMNS // 16]))


@triton.jit
def reaching_kernel(
    centred: tl.tensor,
    low: tl.tensor,
    inverse: tl.tensor,
    slack: tl.tensor,
    factors: tl.tensor,
    offsets: tl.tensor,
    words: tl.tensor,
    groups: tl.tensor,
    rows: tl.tensor,
    COPY_ENGINE: tl.constexpr,
    DEPTH: tl.constexpr,
    STEP: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    row_tile, tile = _tile(tl.cdiv(rows, ROWS), groups, COLUMNS)
    scores = _product(
        centred, low, row_tile * ROWS, tile * COLUMNS, rows, COPY_ENGINE, DEPTH, ROWS, COLUMNS, STEP
    )  # [ROWS, COLUMNS]
    row = row_tile * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    factor = tl.load(factors + tile * COLUMNS + column)
    offset = tl.load(offsets + tile * COLUMNS + column)
    share = tl.load(inverse + row, mask=row < rows, other=1.0)
    more = tl.load(slack + row, mask=row < rows, other=0.0)
    height = scores * factor[None, :] + (offset[None, :] * share[:, None] + more[:, None])
    member = (column % 128 // 4)[None, :]
    bit = tl.where(height < 0, 0, 1 << member)  # NaN is kept, so that it is seen
    word = tl.sum(tl.reshape(bit, [ROWS, COLUMNS // 128, 32, 4]), 2)  # bits are disjoint
    place = tile * (COLUMNS // 32) + tl.arange(0, COLUMNS // 32)
    start = row.to(tl.int64) * groups
    tl.store(words + start[:, None] + place[None, :], tl.reshape(word, [ROWS, COLUMNS // 32]))


def _filled_up(rows: int) -> int:
    return triton.cdiv(rows, ROW_STEP) * ROW_STEP


def group_maxima(
    short: Tensor, inverse: Tensor, low: GroupedLow, offsets: Tensor, tile: Tile = TILE
) -> Tensor:
    """Compute the keys of each group's two largest scores: int32 [padded rows, groups, 2].

    Args:
        short: [rows, depth], from `triton_low.shorten`; inverse: float32 [rows], 1 / its scale.
        offsets: float32 [positions], the bias, -inf where there is no latent.
    """
    rows = len(short)
    keys = torch.empty(_filled_up(rows), low.groups, 2, dtype=torch.int32, device=short.device)
    grid, by_name = tile.arguments(short, low)
    group_maxima_kernel[grid](
        *tile.factors(short, low),
        inverse,
        low.scales,
        offsets,
        keys,
        low.groups,
        rows,
        FP8=low.fp8,
        **by_name,
    )
    return keys


def reaching(
    short: Tensor,
    inverse: Tensor,
    low: GroupedLow,
    height: Tensor,
    doubt: Tensor,
    tile: Tile = TILE,
) -> Tensor:
    """Mark scores that may reach their floor: int32 [padded rows, groups], bit m is member m.

    A score s of row r and latent l may reach it if s + height[l] + doubt[r] spread[l] >= 0. After
    division by spread and the row's scale, that is two products and two sums for each score.

    Args:
        short, inverse: as in `group_maxima`.
        height: float32 [n_latents], bias - floor. doubt: float32 [rows].
    """
    rows = len(short)
    words = torch.empty(_filled_up(rows), low.groups, dtype=torch.int32, device=short.device)
    spread = low.spread.clamp(min=MIN_SPREAD)
    grid, by_name = tile.arguments(short, low)
    reaching_kernel[grid](
        *tile.factors(short, low),
        inverse,
        doubt * inverse,
        low.scales / low.by_position(spread, 1.0),
        low.by_position(height / spread, -torch.inf),
        words,
        low.groups,
        rows,
        **by_name,
    )
    return words
