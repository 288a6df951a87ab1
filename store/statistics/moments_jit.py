"""Compiled loops of the shard statistics: moments of the rows in one pass.

This module has only loops over numpy arrays; `stats` calls them. They use one thread, a fixed order
of sums and no fast-math, so the same rows give the same bits on every machine.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from sae_harvest.common.cache import use_numba_cache

use_numba_cache()
from numba import njit, types  # noqa: E402 - the cache folder must be set before
from numba.extending import overload  # noqa: E402

EXACT = {"cache": True, "nogil": True, "error_model": "numpy"}
BLOCK_ROWS = 256  # rows summed around one pilot row; longer blocks lose digits, see below


def as_float(bits: Any) -> Any:
    """Return the float32 of given bits: uint32 of a float32, or uint16 of a float16."""
    raise NotImplementedError("only compiled code calls this")


@overload(as_float)
def _as_float(bits: Any) -> Any:
    return _half if bits == types.uint16 else _single


def _single(bits: Any) -> Any:
    return np.uint32(bits).view(np.float32)


def _half(bits: Any) -> Any:
    # Integer arithmetic without subnormal float32: some libraries make a process treat those as
    # zero. Only choices between two values, which vectorise.
    magnitude = np.uint32(bits) & np.uint32(0x7FFF)
    rebias = np.uint32(0x70000000) if magnitude >= np.uint32(0x7C00) else np.uint32(0x38000000)
    wide = np.uint32(np.uint32(magnitude << np.uint32(13)) + rebias)
    small = np.float32(np.float32(np.int32(magnitude)) * np.float32(2.0**-24))
    chosen = small.view(np.uint32) if magnitude < np.uint32(0x0400) else wide
    sign = np.uint32(np.uint32(np.uint32(bits) & np.uint32(0x8000)) << np.uint32(16))
    return np.uint32(chosen | sign).view(np.float32)


@njit(**EXACT)
def add_moments(bits: Any, is_apart: Any, rows: Any, mean: Any, m2: Any) -> None:
    """Add rows to the moments of two groups: rows not apart (0) and rows apart (1).

    In a block, differences from the first row of each group are summed. That row itself counts in
    m2, so the sum of squares is at most BLOCK_ROWS + 1 times m2, and the subtraction loses at most
    that factor for any data. Blocks are merged by the formula of Chan, Golub and LeVeque.

    Args:
        bits: uint16 (of float16) or uint32 (of float32) [rows, width].
        is_apart: bool [rows].
        rows: int64 [2]; mean, m2: float64 [2, width], added to.
    """
    width = bits.shape[1]
    pilot, total, squares = np.empty((2, width)), np.empty((2, width)), np.empty((2, width))
    found = np.empty(2, np.int64)
    for first in range(0, bits.shape[0], BLOCK_ROWS):
        found[:] = 0
        for row in range(first, min(first + BLOCK_ROWS, bits.shape[0])):
            group = int(is_apart[row])
            x, p, s, q = bits[row], pilot[group], total[group], squares[group]
            if found[group] == 0:
                for i in range(width):
                    p[i] = as_float(x[i])
                    s[i] = 0
                    q[i] = 0
            else:
                for i in range(width):
                    d = np.float64(as_float(x[i])) - p[i]
                    s[i] += d
                    q[i] += d * d
            found[group] += 1
        for group in range(2):
            n = found[group]
            if n == 0:
                continue
            before = rows[group]
            rows[group] = before + n
            share = n / rows[group]
            p, s, q, m, v = pilot[group], total[group], squares[group], mean[group], m2[group]
            for i in range(width):
                shift = s[i] / n
                delta = p[i] + shift - m[i]
                m[i] += delta * share
                v[i] += max(q[i] - s[i] * shift, 0.0) + delta * delta * (before * share)


@njit(**EXACT)
def add_squared_error(bits: Any, other: Any, error: Any) -> None:
    """Add to error[channel] the sum over rows of the squared difference.

    Args:
        bits, other: uint16 (of float16) or uint32 (of float32) [rows, width].
        error: float64 [width].
    """
    for row in range(bits.shape[0]):
        x, y = bits[row], other[row]
        for i in range(x.shape[0]):
            difference = np.float64(as_float(x[i])) - np.float64(as_float(y[i]))
            error[i] += difference * difference
