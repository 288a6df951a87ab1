"""Rows as 8-bit integers, rotated first so that a few large dimensions don't spoil the others.

The same orthogonal map is applied to both factors of W_enc c, so that their products don't change:
random signs, then a Hadamard transform across blocks of dimensions. Language models have dimensions
far larger than the others; the map spreads such a dimension over all blocks. The rounding steps
follow the largest number of a row; rounding then changes a product by about 1 % of
|W_enc| |c| / sqrt(d_in).
"""

from __future__ import annotations

from typing import Any

import numpy as np

from sae_harvest.train.sae.kernels.jit import FAST, njit, prange

MAX_BLOCKS = 64  # a power of two, as the transform needs
MIN_BLOCK = 8  # numbers of a block, at least
MIN_WIDTH = 4  # torch 2.13 gives zeros for products of width 1
LARGEST = 127  # largest code; -128 isn't used
SEED = 0
PARTS = 64  # pieces of the weights, which the threads take in turn


def blocks_of(d_in: int) -> int:
    """Return the number of blocks of a row."""
    blocks = MAX_BLOCKS
    while blocks > 1 and d_in < blocks * MIN_BLOCK:
        blocks //= 2
    return blocks


def padded_width(d_in: int) -> int:
    """Return the number of codes of a row: d_in, rounded up to whole blocks."""
    blocks = blocks_of(d_in)
    return max(MIN_WIDTH, -(-d_in // blocks) * blocks)


def random_signs(d_in: int) -> Any:
    """Draw float32 [d_in] of -1 and 1, the same in each call."""
    return np.random.default_rng(SEED).choice(np.array([-1, 1], np.float32), d_in)


@njit(**FAST)
def _mix(row: Any, blocks: int) -> None:
    """Apply a Hadamard transform, not normalised, across the blocks of a row, in place."""
    size = row.shape[0]
    half = size // blocks
    while half < size:
        for start in range(0, size, 2 * half):
            a, b = row[start : start + half], row[start + half : start + 2 * half]
            for i in range(half):
                first, second = a[i], b[i]
                a[i] = first + second
                b[i] = first - second
        half *= 2


@njit(**FAST)
def quantize_rows(source: Any, signs: Any, blocks: int, codes: Any, scale: Any, norms: Any) -> None:
    """Rotate and round rows, such that codes * scale is about the rotated row.

    Args:
        source: float32 [rows, d_in]. signs: float32 [d_in], -1 or 1.
        blocks: blocks of a row, a power of two that divides the width.
        codes: int8 [rows, width], written.
        scale, norms: float32 [rows], written. For a row that is not finite, the norm is infinite,
            and the codes and the scale are zero.
    """
    d_in, width = source.shape[1], codes.shape[1]
    root = np.float32(1 / np.sqrt(blocks))
    for row in range(source.shape[0]):
        x, out = source[row], codes[row]
        mixed = np.zeros(width, np.float32)
        square = np.float32(0)
        for i in range(d_in):
            mixed[i] = x[i] * signs[i]
            square += x[i] * x[i]
        if not np.isfinite(square):
            norms[row] = np.inf
            scale[row] = 0
            out[:] = 0
            continue
        _mix(mixed, blocks)
        largest = np.int32(0)  # bits of absolute values, which have the same order as the values
        bits = mixed.view(np.int32)
        for i in range(width):
            largest = max(largest, np.int32(bits[i] & np.int32(0x7FFFFFFF)))
        top = np.int32(largest).view(np.float32)
        norms[row] = np.sqrt(square)
        scale[row] = top * root / np.float32(LARGEST)
        inverse = np.float32(LARGEST) / top if top > 0 else np.float32(0)
        for i in range(width):
            out[i] = np.int8(np.floor(mixed[i] * inverse + np.float32(0.5)))


@njit(parallel=True, **FAST)
def quantize_weights(
    source: Any, signs: Any, blocks: int, codes: Any, scale: Any, norms: Any
) -> None:
    """Do `quantize_rows` in numba's own threads, which are still awake after the step before."""
    rows = source.shape[0]
    for part in prange(PARTS):
        low, high = part * rows // PARTS, (part + 1) * rows // PARTS
        out = codes[low:high], scale[low:high], norms[low:high]
        quantize_rows(source[low:high], signs, blocks, *out)
