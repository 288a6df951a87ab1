"""Co-firing, counted one latent at a time. One thread does one latent, whose counts stay in the
thread's cache; the rows on which it fires are prefetched.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from sae_harvest.common.cache import use_numba_cache
from sae_harvest.pipelines.features.counting.cpu_prefetch import LINE, prefetch

use_numba_cache()

from numba import njit, prange  # noqa: E402

SOME = 64  # counts that are scanned together
AHEAD = 4  # rows prefetched: a row that is not in the cache costs as much as 30 counts


@njit(nogil=True, cache=True)
def transposed(
    starts: npt.NDArray[np.int64], number: npt.NDArray[np.int32], n: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int32]]:
    """Transpose lists of numbers below n: return, for each number, the lists that hold it.

    Firings sorted by latent become firings sorted by row, and back.

    Args:
        starts: where each list begins [lists + 1].
        number: the contents of the lists [pairs].

    Returns:
        starts [n + 1], and the lists of each number, increasing, [pairs].
    """
    new_starts = np.zeros(n + 1, np.int64)
    for p in range(len(number)):
        new_starts[number[p] + 1] += 1
    for i in range(n):
        new_starts[i + 1] += new_starts[i]
    cursor = new_starts[:-1].copy()
    lists = np.empty(len(number), np.int32)
    for i in range(len(starts) - 1):
        for p in range(starts[i], starts[i + 1]):
            lists[cursor[number[p]]] = i
            cursor[number[p]] += 1
    return new_starts, lists


@njit(parallel=True, nogil=True, cache=True)
def most_together(
    first: int,
    starts: npt.NDArray[np.int64],
    rows: npt.NDArray[np.int32],
    row_starts: npt.NDArray[np.int64],
    latents: npt.NDArray[np.integer],
    asked: npt.NDArray[np.int64],
    n: int,
    parts: int,
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Find the latents with the highest Jaccard index, for some latents from number `first` on.

    Of equal ones, the lower latent comes first.

    Args:
        starts, rows: the rows on which each latent fires [n_latents + 1], [pairs].
        row_starts, latents: the same by row, [rows + 1], [pairs]; two-byte latents are faster.
        asked: other latents to count co-firing with, int64 [some latents, any].
        n: number of nearest latents.
        parts: number of parts of the latents, for threads.

    Returns:
        nearest [some latents, n], -1 where fewer co-fire; rows on which both fire, for `asked` and
        for the nearest, in the same shapes.
    """
    some = len(asked)
    best = np.full((some, n), -1, np.int64)
    asked_together = np.zeros(asked.shape, np.int64)
    best_together = np.zeros((some, n), np.int64)
    line, n_latents = LINE // latents.itemsize, len(starts) - 1
    fewest = np.full(-(-n_latents // SOME), len(rows))  # fewest firings in each SOME
    for latent in range(n_latents):
        fired = starts[latent + 1] - starts[latent]
        fewest[latent // SOME] = min(fewest[latent // SOME], fired)
    for part in prange(parts):
        together = np.zeros(n_latents, np.int32)
        index = np.zeros(n)
        for i in range(part * some // parts, (part + 1) * some // parts):
            own = first + i
            for p in range(starts[own], starts[own + 1]):
                if p + 2 * AHEAD < len(rows):
                    prefetch(row_starts, rows[p + 2 * AHEAD])
                    soon = row_starts[rows[p + AHEAD]]
                    prefetch(latents, soon)
                    prefetch(latents, soon + line)
                for q in range(row_starts[rows[p]], row_starts[rows[p] + 1]):
                    together[latents[q]] += 1
            own_fired = together[own]
            for j in range(asked.shape[1]):
                asked_together[i, j] = together[asked[i, j]]
            index[:] = 0
            for block in range(len(fewest)):
                # both / (fired + other - both) has to be above the last one
                last = index[n - 1]
                bound = last * max(float(own_fired), (own_fired + fewest[block]) / (1 + last))
                least = int(bound * (1 - 1e-9))
                start = block * SOME
                some_together = together[start : start + SOME]
                most = np.int32(0)
                for j in range(len(some_together)):
                    most = max(most, some_together[j])
                if most <= least:
                    continue
                for j in range(start, start + len(some_together)):
                    both = together[j]
                    if both <= least or j == own:
                        continue
                    jaccard = both / (own_fired + (starts[j + 1] - starts[j]) - both)
                    if jaccard <= index[n - 1]:
                        continue
                    at = n - 1
                    while at > 0 and index[at - 1] < jaccard:
                        index[at], best[i, at] = index[at - 1], best[i, at - 1]
                        best_together[i, at] = best_together[i, at - 1]
                        at -= 1
                    index[at], best[i, at], best_together[i, at] = jaccard, j, both
            together[:] = 0
    return best, asked_together, best_together
