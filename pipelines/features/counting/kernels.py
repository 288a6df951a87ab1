"""Loops over (row, latent, value) triples sorted by latent. One thread does one latent, so that
every result is the same for any number of threads.

They are numba kernels; they change arrays in place where a docstring says so.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from sae_harvest.common.cache import use_numba_cache

use_numba_cache()

from numba import njit, prange  # noqa: E402

BINS_PER_OCTAVE = 16
LOWEST_OCTAVE, OCTAVES = -12, 24
BINS = OCTAVES * BINS_PER_OCTAVE  # bin 0 begins at 2**-12, the last one ends at 2**12


@njit(cache=True)
def histogram_bin(value: float) -> int:
    """Return the log-spaced bin of a positive value; the first and last bin are open."""
    position = int(np.floor((np.log2(value) - LOWEST_OCTAVE) * BINS_PER_OCTAVE))
    return min(max(position, 0), BINS - 1)


@njit(parallel=True, nogil=True, cache=True)
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
    positions: npt.NDArray[np.int64],
) -> None:
    """Add a block of whole contexts to the running counts, in place.

    power_sums [n_latents, 4] holds the sums of a, a², a³ and a⁴ over firings; histogram is
    [n_latents, BINS]; positions [n_latents, parts] counts firings by part of the context.
    """
    parts = positions.shape[1]
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
            positions[i, (row[p] - context * context_length) * parts // context_length] += 1
            if context != last_context:
                n_contexts[i] += 1
                last_context = context


@njit(cache=True)
def mix(x: np.uint64) -> np.uint64:
    """Mix 64 bits (finaliser of splitmix64): every input bit affects every output bit."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


@njit(cache=True)
def hashed(seed: int, latent: int, number: int) -> np.uint64:
    """Return a pseudo-random number for each (seed, latent, number)."""
    key = np.uint64(seed) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(latent)
    return mix(mix(key) + np.uint64(number))


@njit(cache=True)
def insert(
    i: int,
    leaves: int,
    score: float,
    r: int,
    a: float,
    document: int,
    priority: npt.NDArray[np.float64],
    rows: npt.NDArray[np.int64],
    values: npt.NDArray[np.float32],
    documents: npt.NDArray[np.int64],
) -> None:
    """Put a firing into list i in place of entry `leaves`; priorities stay decreasing."""
    at = leaves
    while at > 0 and priority[i, at - 1] < score:
        priority[i, at] = priority[i, at - 1]
        rows[i, at] = rows[i, at - 1]
        values[i, at] = values[i, at - 1]
        documents[i, at] = documents[i, at - 1]
        at -= 1
    priority[i, at], rows[i, at], values[i, at], documents[i, at] = score, r, a, document


@njit(parallel=True, nogil=True, cache=True)
def keep_top(
    starts: npt.NDArray[np.int64],
    row: npt.NDArray[np.int32],
    value: npt.NDArray[np.float32],
    document: npt.NDArray[np.int64],
    first_row: int,
    kept: npt.NDArray[np.int64],
    priority: npt.NDArray[np.float64],
    rows: npt.NDArray[np.int64],
    values: npt.NDArray[np.float32],
    documents: npt.NDArray[np.int64],
) -> None:
    """Offer a block's firings to each latent's list of highest activations, in place.

    A list has one place per document; of equal activations, the lower row stays. kept [lists]
    counts the places in use; the other arrays are [lists, places]. document holds the document of
    each row of the block.
    """
    places = rows.shape[1]
    for i in prange(len(starts) - 1):
        for p in range(starts[i], starts[i + 1]):
            score = np.float64(value[p])
            n = kept[i]
            if n == places and score <= priority[i, n - 1]:
                continue
            d = document[row[p]]
            leaves = n  # the place to fill: a new one, or
            for q in range(n):  # the place of the same document
                if documents[i, q] == d:
                    leaves = q
            if leaves < n and priority[i, leaves] >= score:
                continue
            if leaves == n and n == places:  # or the last place
                leaves = n - 1
            if leaves == n:
                kept[i] = n + 1
            insert(
                i, leaves, score, first_row + row[p], value[p], d, priority, rows, values, documents
            )


@njit(parallel=True, nogil=True, cache=True)
def draw(
    starts: npt.NDArray[np.int64],
    row: npt.NDArray[np.int32],
    value: npt.NDArray[np.float32],
    document: npt.NDArray[np.int64],
    first_row: int,
    first_latent: int,
    edges: npt.NDArray[np.float64],
    seed: int,
    kept: npt.NDArray[np.int64],
    priority: npt.NDArray[np.float64],
    rows: npt.NDArray[np.int64],
    values: npt.NDArray[np.float32],
    documents: npt.NDArray[np.int64],
) -> None:
    """Draw from each latent's firings, uniformly and without replacement, in place.

    A firing belongs to the list of its latent and of the part of its activation. edges
    [n_latents, parts - 1] increase, and a part begins at its edge; there are n_latents * parts
    lists. The firings with the highest hashes of (seed, latent, row) stay.
    """
    places, parts = rows.shape[1], edges.shape[1] + 1
    for i in prange(len(starts) - 1):
        for p in range(starts[i], starts[i + 1]):
            r = first_row + row[p]
            part = 0  # without branches, which are often mispredicted
            for edge in edges[i]:
                part += value[p] >= edge
            at = i * parts + part
            score = np.float64(hashed(seed, first_latent + i, r) >> np.uint64(11))
            n = kept[at]
            if n == places and score <= priority[at, n - 1]:
                continue
            leaves = n
            if n == places:
                leaves = n - 1
            else:
                kept[at] = n + 1
            d = document[row[p]]
            insert(at, leaves, score, r, value[p], d, priority, rows, values, documents)


@njit(parallel=True, nogil=True, cache=True)
def append_firings(
    starts: npt.NDArray[np.int64],
    row: npt.NDArray[np.int32],
    value: npt.NDArray[np.float32],
    further: int,
    ends: npt.NDArray[np.int64],
    rows: npt.NDArray[np.int32],
    values: npt.NDArray[np.float32],
) -> None:
    """Append each latent's firings at its end in larger lists, and move the ends, in place.

    further: number added to the row numbers.
    """
    for i in prange(len(ends)):
        at = ends[i]
        for p in range(starts[i], starts[i + 1]):
            rows[at], values[at] = row[p] + further, value[p]
            at += 1
        ends[i] = at


@njit(parallel=True, nogil=True, cache=True)
def cut_windows(
    starts: npt.NDArray[np.int64],
    row: npt.NDArray[np.int32],
    value: npt.NDArray[np.float32],
    latent: npt.NDArray[np.int64],
    begin: npt.NDArray[np.int64],
    at: npt.NDArray[np.int64],
    window: int,
    windows: npt.NDArray[np.float32],
) -> None:
    """Write the activations of latent[j] from row begin[j] on into windows[at[j]], in place.

    latent counts from the first latent in `starts`, begin from the first row; windows [any, window]
    must be 0 before.
    """
    for j in prange(len(latent)):
        low, high = starts[latent[j]], starts[latent[j] + 1]
        q = low + np.searchsorted(row[low:high], begin[j])
        while q < high and row[q] < begin[j] + window:
            windows[at[j], row[q] - begin[j]] = value[q]
            q += 1


@njit(parallel=True, nogil=True, cache=True)
def fires_within(
    starts: npt.NDArray[np.int64],
    row: npt.NDArray[np.int32],
    latent: npt.NDArray[np.int64],
    begin: npt.NDArray[np.int64],
    window: int,
) -> npt.NDArray[np.bool_]:
    """Whether latent[j] fires in the window from row begin[j]; arrays as in `cut_windows`."""
    fires = np.zeros(len(latent), np.bool_)
    for j in prange(len(latent)):
        low, high = starts[latent[j]], starts[latent[j] + 1]
        q = low + np.searchsorted(row[low:high], begin[j])
        fires[j] = q < high and row[q] < begin[j] + window
    return fires


@njit(cache=True)
def draw_by_token(
    token: npt.NDArray[np.int32],
    wanted: npt.NDArray[np.bool_],
    first_row: int,
    seed: int,
    priority: npt.NDArray[np.uint64],
    rows: npt.NDArray[np.int64],
) -> None:
    """Keep for each token the rows with the highest hashes [tokens, places], in place."""
    places = rows.shape[1]
    for p in range(len(token)):
        if not wanted[p]:
            continue
        t, r = token[p], first_row + p
        score = hashed(seed, t, r) | np.uint64(1)
        at = places
        while at > 0 and priority[t, at - 1] < score:
            at -= 1
        for q in range(places - 1, at, -1):
            priority[t, q], rows[t, q] = priority[t, q - 1], rows[t, q - 1]
        if at < places:
            priority[t, at], rows[t, at] = score, r


@njit(parallel=True, nogil=True, cache=True)
def draw_rows(
    latents: npt.NDArray[np.int64], n_rows: int, n: int, seed: int
) -> npt.NDArray[np.int64]:
    """Row numbers drawn uniformly for each latent [latents, n], with replacement."""
    rows = np.empty((len(latents), n), np.int64)
    for i in prange(len(latents)):
        for j in range(n):
            rows[i, j] = hashed(seed, latents[i], j) % np.uint64(n_rows)
    return rows
