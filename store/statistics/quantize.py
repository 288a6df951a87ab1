"""int8 per channel: code * scale + offset, calibrated on the ordinary rows of one shard.

A massive activation would stretch the range of its channel, so that ordinary rows share a few
codes. Rows *apart* are therefore left out of the calibration, get the code 0, and are kept exactly
beside the codes. These are the outlier rows, and a few rows that are far out in a single channel.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from sae_harvest.store.statistics.stats import bits_of, moments_of_groups

MAX_CODE = 127  # -128 is the fill value, never a number of a row
BINS = 500  # of a channel's range; not a power of two, or channels would share cache lines
ROUNDS = 4  # moves of both ends of a range; after the second they hardly change
APART_DEVIATIONS = 10.0
APART_SHARE = 1e-3  # largest share of rows apart because of a single channel
BLOCK_ROWS = 64  # rows decoded at a time, so that the second step finds them in the cache


def rows_apart(x: npt.NDArray[Any], is_outlier: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
    """Return the rows to keep exactly, bool [rows]: outliers, and rows far out in some channel.

    A row is far out if a channel is more than ten standard deviations from the mean of the ordinary
    rows. At most a thousandth of the rows are taken, the farthest first: channels that are mostly
    zero would give more.

    Args:
        x: float16 or float32 [rows, width].
        is_outlier: bool [rows], by norm.
    """
    from sae_harvest.store.statistics.quantize_jit import (
        farthest,  # numba takes a second to import; readers do not need it
    )

    ordinary, _ = moments_of_groups(x, is_outlier)
    score = np.empty(len(x), np.float32)
    farthest(
        bits_of(x), ordinary.mean.astype(np.float32), _inverse(np.sqrt(ordinary.variance)), score
    )
    far = np.flatnonzero((score > APART_DEVIATIONS) & ~is_outlier)
    farthest_first = far[np.argsort(-score[far], kind="stable")]
    apart = is_outlier.copy()
    apart[farthest_first[: math.ceil(APART_SHARE * len(x))]] = True
    return apart


def calibrate(x: npt.NDArray[Any], is_apart: npt.NDArray[np.bool_]) -> npt.NDArray[np.float32]:
    """Return scale and offset of each channel, float32 [2, width], for rows that are not apart.

    The codes cover the range of the channel's histogram that gives the least total error: rounding
    error inside the range plus clipping error outside it. A constant channel has scale 0 and
    decodes exactly.

    Args:
        x: float16 or float32 [rows, width], finite.
        is_apart: bool [rows].
    """
    from sae_harvest.store.statistics.quantize_jit import best_parts, count_bins, widen

    width = x.shape[1]
    if is_apart.all():
        return np.zeros((2, width), np.float32)
    bits = bits_of(x)
    low, high = np.full((2, width), [[np.inf], [-np.inf]], np.float32)
    widen(bits, is_apart, low, high)
    bottom, bin_width = low.astype(np.float64), (high.astype(np.float64) - low) / BINS
    counts = np.zeros((width, BINS), np.int32)
    count_bins(bits, is_apart, low, _inverse(bin_width), counts)
    start, stop = np.empty((2, width), np.int64)
    best_parts(counts, 2 * MAX_CODE, ROUNDS, start, stop)
    scale = (stop - start) * bin_width / (2 * MAX_CODE)
    return np.stack([scale, bottom + (start + stop) / 2 * bin_width]).astype(np.float32)


def encode(
    x: npt.NDArray[Any],
    is_apart: npt.NDArray[np.bool_],
    scale: npt.NDArray[np.float32],
    offset: npt.NDArray[np.float32],
) -> npt.NDArray[np.int8]:
    """Return the nearest codes of x, int8 [rows, width], -127..127; 0 in rows apart.

    Args:
        x: float16 or float32 [rows, width].
        is_apart: bool [rows].
        scale, offset: [width], from `calibrate`.
    """
    from sae_harvest.store.statistics.quantize_jit import nearest_codes

    codes = np.empty(x.shape, np.int8)
    limit = np.float32(MAX_CODE)
    nearest_codes(bits_of(x), is_apart, offset, _inverse(scale), limit, codes)
    return codes


def decode(
    codes: npt.NDArray[np.int8],
    scale: npt.NDArray[np.float32],
    offset: npt.NDArray[np.float32],
    out: npt.NDArray[np.float32] | None = None,
) -> npt.NDArray[np.float32]:
    """Return codes * scale + offset, float32 [rows, width]. The caller inserts the rows apart.

    Args:
        codes: int8 [rows, width].
        scale, offset: [width].
        out: float32 [rows, width] to write to and return; a new array if not given.
    """
    if out is None:
        out = np.empty(codes.shape, np.float32)
    for start in range(0, len(codes), BLOCK_ROWS):
        block = out[start : start + BLOCK_ROWS]
        np.multiply(codes[start : start + BLOCK_ROWS], scale, out=block)
        np.add(block, offset, out=block)
    return out


def _inverse(step: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
    """Return 1 / step as float32 [width]; 0 if that overflows, which makes the code 0."""
    usable = step >= np.finfo(np.float32).tiny
    return np.divide(1, step, out=np.zeros(len(step)), where=usable).astype(np.float32)
