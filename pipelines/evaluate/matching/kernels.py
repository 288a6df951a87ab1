"""Loops over the firings of two dictionaries on the same rows, sorted by latent, then row.

One thread does one latent, so that every result is the same for any number of threads. Arrays are
changed in place where a docstring says so.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from sae_harvest.common.cache import use_numba_cache

use_numba_cache()

from numba import njit, prange  # noqa: E402


@njit(parallel=True, nogil=True, cache=True)
def add_joint(
    first: int,
    starts: npt.NDArray[np.int64],
    rows: npt.NDArray[np.int32],
    row_starts: npt.NDArray[np.int64],
    others: npt.NDArray[np.int32],
    counts: npt.NDArray[np.int64],
) -> None:
    """Add to counts [some, n_other] the rows on which both fire, in place.

    Args:
        first: the latent of the first line of counts.
        starts, rows: rows of each latent [n + 1], [pairs].
        row_starts, others: latents of the other dictionary by row, [rows + 1], [pairs].
    """
    for i in prange(len(counts)):
        for p in range(starts[first + i], starts[first + i + 1]):
            for q in range(row_starts[rows[p]], row_starts[rows[p] + 1]):
                counts[i, others[q]] += 1


@njit(parallel=True, nogil=True, cache=True)
def add_sets(
    starts: npt.NDArray[np.int64],
    rows: npt.NDArray[np.int32],
    other_starts: npt.NDArray[np.int64],
    other_rows: npt.NDArray[np.int32],
    n_rows: int,
    list_starts: npt.NDArray[np.int64],
    members: npt.NDArray[np.int64],
    main: npt.NDArray[np.int64],
    gain: npt.NDArray[np.int64],
    without_main: npt.NDArray[np.int64],
    outside: npt.NDArray[np.int64],
    parts: int,
) -> None:
    """Add what sets of the other dictionary's latents do on each latent's rows, in place.

    Args:
        starts, rows: rows of each latent [n + 1], [pairs].
        other_starts, other_rows: the same of the other dictionary.
        n_rows: number of rows.
        list_starts, members: the set of each latent, in order, [n + 1], [members].
        main: another latent of the other dictionary, -1: none [n].
        gain: rows of the latent on which a member fires and no earlier one [members].
        without_main: rows on which latent and member fire and `main` does not [members].
        outside: rows on which a member fires and the latent does not [n].
        parts: number of parts of the latents, for threads.
    """
    n = len(starts) - 1
    for part in prange(parts):
        seen = np.full(n_rows, -1, np.int64)
        for i in range(part * n // parts, (part + 1) * n // parts):
            if list_starts[i] == list_starts[i + 1]:
                continue
            own = rows[starts[i] : starts[i + 1]]
            covered, by_main = np.zeros(len(own), np.bool_), np.zeros(len(own), np.bool_)
            if main[i] >= 0:
                q, end = other_starts[main[i]], other_starts[main[i] + 1]
                for p in range(len(own)):
                    while q < end and other_rows[q] < own[p]:
                        q += 1
                    by_main[p] = q < end and other_rows[q] == own[p]
            for j in range(list_starts[i], list_starts[i + 1]):
                p = 0
                for q in range(other_starts[members[j]], other_starts[members[j] + 1]):
                    row = other_rows[q]
                    while p < len(own) and own[p] < row:
                        p += 1
                    if p < len(own) and own[p] == row:
                        without_main[j] += not by_main[p]
                        if not covered[p]:
                            covered[p] = True
                            gain[j] += 1
                    elif seen[row] != i:
                        seen[row] = i
                        outside[i] += 1


@njit(parallel=True, nogil=True, cache=True)
def keep_strongest(
    first_row: int,
    context_length: int,
    starts: npt.NDArray[np.int64],
    rows: npt.NDArray[np.int32],
    values: npt.NDArray[np.float32],
    other_starts: npt.NDArray[np.int64],
    other_rows: npt.NDArray[np.int32],
    latent: npt.NDArray[np.int64],
    other: npt.NDArray[np.int64],
    best_rows: npt.NDArray[np.int64],
    best_values: npt.NDArray[np.float32],
) -> None:
    """Keep the strongest rows on which latent[j] fires and other[j] does not, in place.

    Args:
        first_row: number of row 0 in the store; the rows are whole contexts.
        other: -1: all rows of the latent count.
        best_rows, best_values: [pairs, places] by falling value, -1 and 0 where there is none. A
            context has one place; of equal values, the lower row stays.
    """
    places = best_rows.shape[1]
    for j in prange(len(latent)):
        q = end = 0
        if other[j] >= 0:
            q, end = other_starts[other[j]], other_starts[other[j] + 1]
        for p in range(starts[latent[j]], starts[latent[j] + 1]):
            while q < end and other_rows[q] < rows[p]:
                q += 1
            if (q < end and other_rows[q] == rows[p]) or values[p] <= best_values[j, places - 1]:
                continue
            row = first_row + rows[p]
            at = places - 1  # the place that it takes: of its context, or the last one
            for k in range(places):
                held = best_rows[j, k]
                if held >= 0 and held // context_length == row // context_length:
                    at = k
            if values[p] <= best_values[j, at]:
                continue
            while at > 0 and best_values[j, at - 1] < values[p]:
                best_values[j, at], best_rows[j, at] = best_values[j, at - 1], best_rows[j, at - 1]
                at -= 1
            best_values[j, at], best_rows[j, at] = values[p], row
