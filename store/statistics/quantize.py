"""int8 per channel: code * scale + offset, calibrated on the ordinary rows of one shard.

A massive activation would stretch the range of its channel until ordinary rows fall on a handful
of codes. Rows *apart* are therefore left out of the calibration, have the code 0, and are kept
exactly beside the codes: the outlier rows, and the few rows that are far out in a single channel.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from sae_harvest.store.statistics.stats import bits_of, moments_of_groups

MAX_CODE = 127  # -128 is the fill value, never a number of a row
BINS = 500  # of a channel's range. No power of two: all channels would share few cache lines
ROUNDS = 4  # moves of both ends of a range; after the second they hardly change
APART_DEVIATIONS = 10.0
APART_SHARE = 1e-3  # most rows apart because of a single channel
BLOCK_ROWS = 64  # decoded at a time: the second step finds them in the cache


def rows_apart(x: npt.NDArray[Any], is_outlier: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
    """Return the rows to keep exactly, bool [rows]: outliers, and rows far out in some channel.

    Far out is more than ten standard deviations of the ordinary rows from their mean. Where more
    than a thousandth of the rows are, as in channels that are mostly zero, it is the farthest.

    Args:
        x: float16 or float32 [rows, width].
        is_outlier: bool [rows], by norm.
    """
    from sae_harvest.store.statistics.quantize_jit import (
        farthest,  # numba takes a second to import; readers do without
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
    """Scale and offset of each channel, float32 [2, width], for the rows that are not apart.

    The codes span the part of the channel's histogram that loses least, rounding inside and
    clipping outside taken together. A constant channel has scale 0 and decodes exactly.

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
    """Return the codes of x, int8 [rows, width], -127..127: the nearest, and 0 in the rows apart.

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
    """codes * scale + offset, float32 [rows, width]; the rows apart are for the caller to put in.

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
    """1 / step as float32 [width]; 0 where it would overflow, so that the code is 0."""
    usable = step >= np.finfo(np.float32).tiny
    return np.divide(1, step, out=np.zeros(len(step)), where=usable).astype(np.float32)
