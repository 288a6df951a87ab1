"""Rows as 8-bit integers, mixed first so that a few large dimensions don't spoil the rest.

Both factors of W_enc c are mixed by the same orthogonal map, which leaves their products as they
are: random signs, then a Hadamard transform across blocks of dimensions. A dimension far larger
than the others, as language models have, is spread over all blocks; rounding to steps of the
largest part of a row then changes a product by about 1 % of |W_enc| |c| / sqrt(d_in).
"""

from __future__ import annotations

from typing import Any

import numpy as np

from sae_harvest.train.sae.kernels.jit import FAST, njit, prange

MAX_BLOCKS = 64  # a power of two, as the transform needs
MIN_BLOCK = 8  # numbers that the transform adds at a time
MIN_WIDTH = 4  # torch 2.13 gives zeros for products of width 1
LARGEST = 127  # of a code; -128 isn't used
SEED = 0
PARTS = 64  # pieces of the weights that threads take in turn


def blocks_of(d_in: int) -> int:
    """The number of blocks that a row is cut into."""
    blocks = MAX_BLOCKS
    while blocks > 1 and d_in < blocks * MIN_BLOCK:
        blocks //= 2
    return blocks


def padded_width(d_in: int) -> int:
    """Codes of a row: d_in, rounded up to whole blocks."""
    blocks = blocks_of(d_in)
    return max(MIN_WIDTH, -(-d_in // blocks) * blocks)


def random_signs(d_in: int) -> Any:
    """float32 [d_in], -1 or 1, always the same."""
    return np.random.default_rng(SEED).choice(np.array([-1, 1], np.float32), d_in)


@njit(**FAST)
def _mix(row: Any, blocks: int) -> None:
    """Hadamard transform, not normalised, across the blocks of a row, in place."""
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
    """codes * scale is each row, mixed and rounded.

    Args:
        source: float32 [rows, d_in]. signs: float32 [d_in], -1 or 1.
        blocks: of a row, a power of two that divides the width.
        codes: int8 [rows, width], written. scale, norms: float32 [rows], written; the norm of a
            row that is not finite is infinite, its codes and scale are zero.
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
        largest = np.int32(0)  # of the bits of absolute values, which order as those do
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
    """`quantize_rows` in numba's own threads, which the step before it has left awake."""
    rows = source.shape[0]
    for part in prange(PARTS):
        low, high = part * rows // PARTS, (part + 1) * rows // PARTS
        out = codes[low:high], scale[low:high], norms[low:high]
        quantize_rows(source[low:high], signs, blocks, *out)
