"""Loops over (row, latent, value) triples sorted by latent. One latent is one thread's work, so
that every result is the same for any number of threads.

numba kernels; arrays are changed in place where a docstring says so.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from store.paths import use_numba_cache

use_numba_cache()

from numba import njit, prange  # noqa: E402

BINS = 96
BINS_PER_OCTAVE = 4
LOWEST_OCTAVE = -12  # bin 0 begins at 2**-12, the last one ends at 2**12


@njit(cache=True)
def histogram_bin(value: float) -> int:
    """Number of the log-spaced bin a positive value falls in; the ends are open."""
    position = int(np.floor((np.log2(value) - LOWEST_OCTAVE) * BINS_PER_OCTAVE))
    return min(max(position, 0), BINS - 1)


@njit(parallel=True, cache=True)
def add_moments(
    starts: npt.NDArray[np.int64],
    row: npt.NDArray[np.int32],
    value: npt.NDArray[np.float32],
    context_length: int,
    n_fire: npt.NDArray[np.int64],
    n_contexts: npt.NDArray[np.int64],
    power_sums: npt.NDArray[np.float64],
    largest: npt.NDArray[np.float32],
    histogram: npt.NDArray[np.int64],
) -> None:
    """Add a block of whole contexts to the running counts, in place.

    power_sums [n_latents, 4] holds the sums of a, a², a³ and a⁴ over firings; histogram is
    [n_latents, BINS].
    """
    for i in prange(len(starts) - 1):
        last_context = -1
        for p in range(starts[i], starts[i + 1]):
            a = np.float64(value[p])
            n_fire[i] += 1
            power_sums[i, 0] += a
            power_sums[i, 1] += a * a
            power_sums[i, 2] += a * a * a
            power_sums[i, 3] += a * a * a * a
            largest[i] = max(largest[i], value[p])
            histogram[i, histogram_bin(a)] += 1
            context = row[p] // context_length
            if context != last_context:
                n_contexts[i] += 1
                last_context = context


@njit(parallel=True, cache=True)
def count_tokens(
    starts: npt.NDArray[np.int64],
    row: npt.NDArray[np.int32],
    value: npt.NDArray[np.float32],
    tokens: npt.NDArray[np.int32],
    token: npt.NDArray[np.int32],
    count: npt.NDArray[np.int64],
    total: npt.NDArray[np.float64],
) -> npt.NDArray[np.int64]:
    """Per latent, the distinct tokens it fired on, with count and sum of activations.

    token, count and total [firings] receive them at the front of each latent's segment; the
    number of distinct tokens per latent is returned.
    """
    n_distinct = np.zeros(len(starts) - 1, np.int64)
    for i in prange(len(starts) - 1):
        low, high = starts[i], starts[i + 1]
        ids = tokens[row[low:high]]
        order = np.argsort(ids)
        at = low - 1
        for q in range(high - low):
            t = ids[order[q]]
            if q == 0 or t != token[at]:
                at += 1
                token[at], count[at], total[at] = t, 0, 0.0
            count[at] += 1
            total[at] += value[low + order[q]]
        n_distinct[i] = at + 1 - low
    return n_distinct


@njit(cache=True)
def mix(x: np.uint64) -> np.uint64:
    """A 64-bit finaliser (the constants of splitmix64): every input bit reaches every output."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


@njit(parallel=True, cache=True)
def keep_best(
    starts: npt.NDArray[np.int64],
    row: npt.NDArray[np.int32],
    value: npt.NDArray[np.float32],
    documents: npt.NDArray[np.int64],
    first_row: int,
    context_length: int,
    before: int,
    by_document: bool,
    seed: int,
    kept: npt.NDArray[np.int64],
    priority: npt.NDArray[np.float64],
    peak_row: npt.NDArray[np.int64],
    peak_document: npt.NDArray[np.int64],
    window_start: npt.NDArray[np.int64],
    slot: npt.NDArray[np.int64],
    windows: npt.NDArray[np.float32],
) -> None:
    """Offer a block's firings to each latent's short list, in place.

    With `by_document` the priority is the activation and a document holds one place at most;
    without, it is a hash of (seed, latent, row), which draws uniformly from all firings. Lists
    are sorted by descending priority; equal ones keep the lower row. kept [n_latents] counts
    the places in use; priority, peak_row, peak_document, window_start and slot are
    [n_latents, places]; windows [n_latents, places, window] holds, at `slot`, the latent's
    activations around the peak.
    """
    places, window = windows.shape[1], windows.shape[2]
    for i in prange(len(starts) - 1):
        for p in range(starts[i], starts[i + 1]):
            r = first_row + row[p]
            if by_document:
                score = np.float64(value[p])
            else:
                key = np.uint64(seed) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(i)
                score = np.float64(mix(mix(key) + np.uint64(r)) >> np.uint64(11))
            n = kept[i]
            if n == places and score <= priority[i, n - 1]:
                continue
            document = documents[row[p]]
            leaves = n  # the place that is given up: a new one, or
            if by_document:
                for q in range(n):  # the one the same document has
                    if peak_document[i, q] == document:
                        leaves = q
            if leaves < n and priority[i, leaves] >= score:
                continue
            if leaves == n and n == places:  # or the last
                leaves = n - 1
            free = slot[i, leaves] if leaves < n else n
            if leaves == n:
                kept[i] = n + 1
            at = leaves
            while at > 0 and priority[i, at - 1] < score:
                priority[i, at] = priority[i, at - 1]
                peak_row[i, at] = peak_row[i, at - 1]
                peak_document[i, at] = peak_document[i, at - 1]
                window_start[i, at] = window_start[i, at - 1]
                slot[i, at] = slot[i, at - 1]
                at -= 1
            context = row[p] // context_length
            position = row[p] - context * context_length
            begin = min(max(position - before, 0), context_length - window)
            priority[i, at] = score
            peak_row[i, at] = r
            peak_document[i, at] = document
            window_start[i, at] = begin
            slot[i, at] = free
            windows[i, free, :] = 0
            low = context * context_length + begin  # row within the block of the window's start
            q = p
            while q >= starts[i] and row[q] >= low:
                q -= 1
            q += 1
            while q < starts[i + 1] and row[q] < low + window:
                windows[i, free, row[q] - low] = value[q]
                q += 1


@njit(cache=True)
def count_together(
    indices: npt.NDArray[Any],
    values: npt.NDArray[np.float32],
    neighbours: npt.NDArray[np.int64],
    together: npt.NDArray[np.int64],
    marks: npt.NDArray[np.int64],
    first_row: int,
) -> None:
    """Count rows on which a latent and its neighbour both fire, in place.

    neighbours and together are [n_latents, n_neighbours]; marks [n_latents] is scratch, -1 at
    the very start.
    """
    rows, k = indices.shape
    for r in range(rows):
        for j in range(k):
            if values[r, j] > 0:
                marks[indices[r, j]] = first_row + r
        for j in range(k):
            if values[r, j] > 0:
                i = indices[r, j]
                for q in range(neighbours.shape[1]):
                    if marks[neighbours[i, q]] == first_row + r:
                        together[i, q] += 1
