"""Compiled loops of the int8 quantization: scores of rows, histograms, their best part, codes.

This module has only loops over numpy arrays; `quantize` calls them. As in `moments_jit`, one thread
and one order give the same bits on every machine. Rows are given as the bits of their numbers,
uint16 (of float16) or uint32 (of float32) [rows, width].
"""

from __future__ import annotations

from typing import Any

import numpy as np

from sae_harvest.store.statistics.moments_jit import EXACT, as_float, njit

ROUNDING = np.float32(1.5 * 2**23)  # adding and subtracting it rounds a small number
NO_SIGN = np.uint32(0x7FFFFFFF)


@njit(**EXACT)
def farthest(bits: Any, mean: Any, inverse: Any, score: Any) -> None:
    """Set score[row] to the largest |x - mean| * inverse of its channels.

    Args:
        mean, inverse: float32 [width]. score: float32 [rows], set.
    """
    for row in range(bits.shape[0]):
        x = bits[row]
        largest = np.uint32(0)  # bits of the largest: positive floats sort like their bits
        for i in range(x.shape[0]):
            distance = np.float32((as_float(x[i]) - mean[i]) * inverse[i])
            largest = np.uint32(max(largest, np.uint32(distance.view(np.uint32) & NO_SIGN)))
        score[row] = np.uint32(largest).view(np.float32)


@njit(**EXACT)
def widen(bits: Any, is_apart: Any, low: Any, high: Any) -> None:
    """Widen low and high, float32 [width], to the range of the rows that are not apart."""
    for row in range(bits.shape[0]):
        if not is_apart[row]:
            x = bits[row]
            for i in range(x.shape[0]):
                value = as_float(x[i])
                low[i] = value if value < low[i] else low[i]
                high[i] = value if value > high[i] else high[i]


@njit(**EXACT)
def count_bins(bits: Any, is_apart: Any, low: Any, per_unit: Any, counts: Any) -> None:
    """Count the rows that are not apart, bin = (x - low) * per_unit of each channel.

    Args:
        low, per_unit: float32 [width], so that no bin is negative. The last bin takes the rest,
            NaN included.
        counts: int32 [width, bins], added to.
    """
    width, bins = counts.shape
    last = np.float32(bins - 1)
    place = np.empty(width, np.uint32)
    for row in range(bits.shape[0]):
        if is_apart[row]:
            continue
        x = bits[row]
        for i in range(width):
            found = (as_float(x[i]) - low[i]) * per_unit[i]
            place[i] = np.int32(found if found < last else last)
        for i in range(width):
            counts[i, np.uint64(place[i])] += 1


@njit(**EXACT)
def _squares_beyond(counts: Any, squares: Any) -> float:
    """Set squares[e] to the sum of (middle - e)^2 over the bins from e, and return their count."""
    bins = counts.shape[0]
    n, first, second = 0.0, 0.0, 0.0  # sums of 1, of distances to the edge, of their squares
    squares[bins] = 0.0
    for edge in range(bins - 1, -1, -1):
        second += 2 * first + n + 0.25 * counts[edge]  # the others are one bin further away
        first += n + 0.5 * counts[edge]
        n += counts[edge]
        squares[edge] = second
    return n


@njit(**EXACT)
def best_parts(counts: Any, steps: int, rounds: int, start: Any, stop: Any) -> None:
    """Find the bins [start, stop) of each channel with the least error for `steps` steps.

    A value inside has the squared error step^2 / 12 on average. A value outside is clipped; its
    squared error is the square of its distance. The two ends are moved in turn.

    Args:
        counts: int32 [width, bins]. start, stop: int64 [width], set.
    """
    width, bins = counts.shape
    above, below = np.empty(bins + 1), np.empty(bins + 1)
    for channel in range(width):
        n = _squares_beyond(counts[channel], above)
        _squares_beyond(counts[channel, ::-1], below)  # below[e]: of the bins under bins - e
        per_square = n / (12.0 * steps * steps)
        a, b = 0, bins
        for _ in range(rounds):
            least = np.inf
            for edge in range(a + 1, bins + 1):
                lost = above[edge] + per_square * (edge - a) ** 2
                if lost <= least:
                    least, b = lost, edge
            least = np.inf
            for edge in range(b - 1, -1, -1):
                lost = below[bins - edge] + per_square * (b - edge) ** 2
                if lost <= least:
                    least, a = lost, edge
        start[channel], stop[channel] = a, b


@njit(**EXACT)
def nearest_codes(
    bits: Any, is_apart: Any, offset: Any, inverse: Any, limit: Any, codes: Any
) -> None:
    """Set codes to the integer nearest (x - offset) * inverse, within ±limit; 0 for rows apart.

    Args:
        offset, inverse: float32 [width]. limit: float32.
        codes: int8 [rows, width], set.
    """
    for row in range(bits.shape[0]):
        target = codes[row]
        if is_apart[row]:
            target[:] = 0
            continue
        x = bits[row]
        for i in range(x.shape[0]):
            place = (as_float(x[i]) - offset[i]) * inverse[i]
            place = place if place < limit else limit
            place = place if place > -limit else -limit
            target[i] = np.int8(np.int32(np.float32(place + ROUNDING) - ROUNDING))
