"""Compiled loops that choose latents: candidates by low precision, then exact float32 values.

Only loops over numpy arrays live here; `train.kernels.cpu` gives them tensors. Every output row
is written by one thread, so results don't depend on the number of threads.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from store.paths import use_numba_cache

use_numba_cache()
from numba import njit, prange  # noqa: E402 - the cache folder must be set before

FAST = {"cache": True, "fastmath": {"reassoc", "contract", "nsz", "arcp"}, "error_model": "numpy"}
BLOCK = 64  # latents whose maximum stands for them: a few vector registers
PARTS = 64  # pieces of a batch that threads take in turn; each allocates its buffers once
LEAST, MOST = -(2**31), 2**31 - 1  # of int32


@njit(**FAST)
def _count_at_least(keys: Any, size: int, threshold: Any) -> Any:
    """How many of the first `size` keys are at least `threshold`."""
    total = np.int32(0)
    for i in range(size):
        total += np.int32(keys[i] >= threshold)
    return total


@njit(**FAST)
def _threshold(keys: Any, size: int, count: int) -> Any:
    """The largest int32 that at least `count` of the keys reach, by bisection."""
    low, high = LEAST, MOST
    while low < high:
        middle = low + ((high - low + 1) >> 1)
        if _count_at_least(keys, size, np.int32(middle)) >= count:
            low = middle
        else:
            high = middle - 1
    return np.int32(low)


@njit(**FAST)
def _value(bits: Any, bias: Any) -> Any:
    """A bfloat16 given by its bits, plus the bias, as float32."""
    return np.int32(np.int32(bits) << np.int32(16)).view(np.float32) + bias


@njit(**FAST)
def _key(value: Any) -> Any:
    """An int32 that orders as the float32 does."""
    bits = np.float32(value).view(np.int32)
    return np.int32(bits ^ ((bits >> np.int32(31)) & np.int32(MOST)))


@njit(**FAST)
def _block_maxima(source: Any, bias: Any, maxima: Any) -> None:
    """The largest key of each whole block."""
    for block in range(maxima.shape[0]):
        # slices, counted from zero: otherwise the bias is gathered number by number
        bits = source[block * BLOCK : (block + 1) * BLOCK]
        offset = bias[block * BLOCK : (block + 1) * BLOCK]
        largest = np.int32(LEAST)
        for i in range(len(bits)):
            largest = max(largest, _key(_value(bits[i], offset[i])))
        maxima[block] = largest


@njit(**FAST)
def _keep_reaching(
    source: Any, bias: Any, first: int, last: int, floor: Any, keys: Any, places: Any, found: int
) -> int:
    """Appends the latents of [first, last) whose key is at least `floor`; the new count.

    `keys` is overwritten up to last - first places beyond the old count.
    """
    bits, offset, fresh = source[first:last], bias[first:last], keys[found : found + last - first]
    for i in range(len(bits)):
        fresh[i] = _key(_value(bits[i], offset[i]))
    kept = found
    for i in range(len(bits)):
        if fresh[i] >= floor:
            keys[kept] = fresh[i]
            places[kept] = first + i
            kept += 1
    return kept


@njit(parallel=True, **FAST)
def choose_rows(preactivations: Any, bias: Any, out: Any) -> None:
    """For each row, where `preactivations + bias` is largest; among equals, the lower index.

    Args:
        preactivations: int16 [rows, n_latents], the bits of bfloat16 values.
        bias: float32 [n_latents].
        out: int32 [rows, count], count <= n_latents, written in increasing order of index.
    """
    rows, count = out.shape
    n_latents = bias.shape[0]
    n_blocks = n_latents // BLOCK
    parts = min(rows, PARTS)
    for part in prange(parts):
        keys = np.empty(n_latents + BLOCK, np.int32)  # those still in question, in order of index
        places = np.empty(n_latents + BLOCK, np.int32)
        maxima = np.empty(n_blocks, np.int32)
        for row in range(part * rows // parts, (part + 1) * rows // parts):
            source = preactivations[row]
            found = 0
            if n_blocks >= 2 * count:
                _block_maxima(source, bias, maxima)
                # `count` blocks reach this, so at least `count` latents do
                floor = _threshold(maxima, n_blocks, count)
                for block in range(n_blocks):
                    if maxima[block] >= floor:
                        first = block * BLOCK
                        found = _keep_reaching(
                            source, bias, first, first + BLOCK, floor, keys, places, found
                        )
                found = _keep_reaching(
                    source, bias, n_blocks * BLOCK, n_latents, floor, keys, places, found
                )
            else:
                found = _keep_reaching(
                    source, bias, 0, n_latents, np.int32(LEAST), keys, places, found
                )
            last = _threshold(keys, found, count)
            ties = count
            if last < MOST:
                ties -= _count_at_least(keys, found, np.int32(last + 1))
            taken = 0
            for i in range(found):
                if keys[i] > last or (keys[i] == last and ties > 0):
                    if keys[i] == last:
                        ties -= 1
                    out[row, taken] = places[i]
                    taken += 1
            for i in range(taken, count):  # among NaN; exact values will be NaN and show it
                out[row, i] = 0


@njit(parallel=True, **FAST)
def exact_rows(
    centred: Any, weight: Any, bias: Any, candidates: Any, relu: bool, indices: Any, values: Any
) -> None:
    """Exact float32 pre-activations of the candidates; the k largest, in decreasing order.

    Args:
        centred: float32 [rows, d_in]. weight: float32 [n_latents, d_in]. bias: float32 [n_latents].
        candidates: int32 [rows, count], increasing. relu: whether negative values become zero.
        indices: int32 [rows, k], written. values: float32 [rows, k], written.
    """
    rows, count = candidates.shape
    k = indices.shape[1]
    d_in = weight.shape[1]
    for row in prange(rows):
        x = centred[row]
        exact = np.empty(count, np.float32)
        for c in range(count):
            latent = candidates[row, c]
            w = weight[latent]
            total = np.float32(0)
            for i in range(d_in):
                total += x[i] * w[i]
            exact[c] = total + bias[latent]
        order = np.argsort(-exact, kind="mergesort")  # stable: ties keep the lower index first
        for j in range(k):
            best = order[j]
            value = exact[best]
            indices[row, j] = candidates[row, best]
            values[row, j] = max(value, np.float32(0)) if relu else value
