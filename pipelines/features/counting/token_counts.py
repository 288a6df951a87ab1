"""The tokens on which each latent fires, with counts and activations, counted block by block.

One thread does one latent and adds its firings in the order of rows, so that results are the same
for any number of threads.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from sae_harvest.common.cache import use_numba_cache
from sae_harvest.pipelines.features.counting.cpu_prefetch import prefetch
from sae_harvest.pipelines.features.encoding.firings import Firings

use_numba_cache()

from numba import get_num_threads, njit, prange  # noqa: E402

AHEAD = 16  # rows whose tokens are prefetched


@dataclass(frozen=True, slots=True, eq=False)
class TokenCounts:
    """Distinct tokens of each of some latents, in increasing order."""

    starts: npt.NDArray[np.int64]
    """int64 [latents + 1], where each latent's pairs begin."""
    token: npt.NDArray[np.int32]
    """int32 [pairs], token id."""
    count: npt.NDArray[np.int64]
    """int64 [pairs], firings on the token."""
    total: npt.NDArray[np.float64]
    """float64 [pairs], sum of activations on the token."""

    @classmethod
    def none(cls, latents: int) -> TokenCounts:
        empty = np.empty(0, np.int32), np.empty(0, np.int64), np.empty(0)
        return cls(np.zeros(latents + 1, np.int64), *empty)

    def plus(self, firings: Firings, tokens: npt.NDArray[np.int32]) -> TokenCounts:
        """Add a block's firings; `tokens` [rows] are the tokens of its rows."""
        n = len(firings.row)
        found = np.empty(n, np.int32), np.empty(n, np.int64), np.empty(n)
        several, parts = 1 + int(tokens.max(initial=0)), 2 * get_num_threads()
        given = firings.starts, firings.row, firings.value, tokens
        sizes = _count(*given, several, parts, *found)
        mine = self.starts, self.token, self.count, self.total
        return TokenCounts(*_add(*mine, firings.starts[:-1], sizes, *found))

    def entropy_bits(self) -> npt.NDArray[np.float64]:
        """Compute the entropy in bits of each latent's firings over tokens, float64 [latents]."""
        return _entropy(self.starts, self.count)

    def strongest(self, n: int, seen: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Find the tokens with the highest mean activations, by decreasing mean, then token.

        Only tokens with at least `seen` firings are used; if a latent has none, its most frequent
        tokens are used.

        Returns:
            where each latent's places begin [latents + 1], at most n of each; places [all].
        """
        places = _strongest(self.starts, self.token, self.count, self.total, n, seen)
        kept = places >= 0
        return np.concatenate([[0], kept.sum(axis=1).cumsum()]), places[kept]

    def commonest_first(self) -> TokenCounts:
        """Sort by decreasing count, then token."""
        order = _by_count(self.starts, self.count)
        return TokenCounts(self.starts, self.token[order], self.count[order], self.total[order])


@njit(nogil=True, cache=True)
def _sort(numbers: npt.NDArray[np.int32], scratch: npt.NDArray[np.int32], most: int) -> None:
    """Sort numbers below `most`, in place: by their last byte, then by the byte before, and so on.

    There are no comparisons, whose branches a processor mispredicts half of the time.
    """
    shift = 0
    while most - 1 >> shift:
        begins = np.zeros(257, np.int64)
        for number in numbers:
            begins[(number >> shift & 255) + 1] += 1
        for byte in range(256):
            begins[byte + 1] += begins[byte]
        for number in numbers:
            byte = number >> shift & 255
            scratch[begins[byte]] = number
            begins[byte] += 1
        numbers[:] = scratch[: len(numbers)]
        shift += 8


@njit(parallel=True, nogil=True, cache=True)
def _count(
    starts: npt.NDArray[np.int64],
    row: npt.NDArray[np.int32],
    value: npt.NDArray[np.float32],
    tokens: npt.NDArray[np.int32],
    n_tokens: int,
    parts: int,
    token: npt.NDArray[np.int32],
    count: npt.NDArray[np.int64],
    total: npt.NDArray[np.float64],
) -> npt.NDArray[np.int64]:
    """Count distinct tokens per latent; write them at the front of the latent's places.

    The latents are divided into `parts`, each with a counter for every token.
    """
    latents = len(starts) - 1
    sizes = np.zeros(latents, np.int64)
    for part in prange(parts):
        counts, totals = np.zeros(n_tokens, np.int64), np.zeros(n_tokens)
        seen, scratch = np.empty((2, n_tokens), np.int32)
        for i in range(part * latents // parts, (part + 1) * latents // parts):
            distinct = 0
            for p in range(starts[i], starts[i + 1]):
                if p + AHEAD < len(row):
                    prefetch(tokens, row[p + AHEAD])
                t = tokens[row[p]]
                if counts[t] == 0:
                    seen[distinct] = t
                    distinct += 1
                counts[t] += 1
                totals[t] += value[p]
            at = starts[i]
            _sort(seen[:distinct], scratch, n_tokens)
            for t in seen[:distinct]:
                token[at], count[at], total[at] = t, counts[t], totals[t]
                counts[t], totals[t] = 0, 0.0
                at += 1
            sizes[i] = distinct
    return sizes


@njit(parallel=True, nogil=True, cache=True)
def _add(
    starts: npt.NDArray[np.int64],
    token: npt.NDArray[np.int32],
    count: npt.NDArray[np.int64],
    total: npt.NDArray[np.float64],
    begins: npt.NDArray[np.int64],
    sizes: npt.NDArray[np.int64],
    other_token: npt.NDArray[np.int32],
    other_count: npt.NDArray[np.int64],
    other_total: npt.NDArray[np.float64],
) -> tuple[
    npt.NDArray[np.int64], npt.NDArray[np.int32], npt.NDArray[np.int64], npt.NDArray[np.float64]
]:
    """Merge two sorted lists of each latent; those of the other begin at `begins`."""
    latents = len(sizes)
    new_starts = np.zeros(latents + 1, np.int64)
    for i in prange(latents):
        p, q = starts[i], begins[i]
        end, other_end = starts[i + 1], begins[i] + sizes[i]
        n = 0
        while p < end and q < other_end:
            a, b = token[p], other_token[q]
            p += a <= b
            q += b <= a
            n += 1
        new_starts[i + 1] = n + (end - p) + (other_end - q)
    for i in range(latents):
        new_starts[i + 1] += new_starts[i]
    pairs = new_starts[latents]
    new_token, new_count = np.empty(pairs, np.int32), np.empty(pairs, np.int64)
    new_total = np.empty(pairs)
    for i in prange(latents):
        p, q = starts[i], begins[i]
        end, other_end = starts[i + 1], begins[i] + sizes[i]
        for at in range(new_starts[i], new_starts[i + 1]):
            mine = p < end and (q == other_end or token[p] <= other_token[q])
            theirs = q < other_end and (p == end or other_token[q] <= token[p])
            new_token[at] = token[p] if mine else other_token[q]
            new_count[at], new_total[at] = 0, 0.0
            if mine:
                new_count[at] += count[p]
                new_total[at] += total[p]
                p += 1
            if theirs:
                new_count[at] += other_count[q]
                new_total[at] += other_total[q]
                q += 1
    return new_starts, new_token, new_count, new_total


@njit(parallel=True, nogil=True, cache=True)
def _by_count(starts: npt.NDArray[np.int64], count: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Return places of each latent's pairs by decreasing count; equal ones keep their order."""
    order = np.empty(len(count), np.int64)
    for i in prange(len(starts) - 1):
        low, high = starts[i], starts[i + 1]
        order[low:high] = low + np.argsort(-count[low:high], kind="mergesort")
    return order


# not parallel: called during parallel loops, which numba allows only with OpenMP
@njit(nogil=True, cache=True)
def _entropy(
    starts: npt.NDArray[np.int64], count: npt.NDArray[np.int64]
) -> npt.NDArray[np.float64]:
    bits = np.zeros(len(starts) - 1)
    for i in range(len(bits)):
        total = count[starts[i] : starts[i + 1]].sum()
        for p in range(starts[i], starts[i + 1]):
            share = count[p] / total
            bits[i] -= share * np.log2(share)
    return bits


@njit(nogil=True, cache=True)
def _strongest(
    starts: npt.NDArray[np.int64],
    token: npt.NDArray[np.int32],
    count: npt.NDArray[np.int64],
    total: npt.NDArray[np.float64],
    n: int,
    seen: int,
) -> npt.NDArray[np.int64]:
    """Do `TokenCounts.strongest`; return places [latents, n], -1 where there are fewer."""
    places = np.full((len(starts) - 1, n), -1, np.int64)
    for i in range(len(places)):
        most = 0
        for p in range(starts[i], starts[i + 1]):
            most = max(most, count[p])
        for p in range(starts[i], starts[i + 1]):
            if count[p] < min(seen, most):
                continue
            mean, at = total[p] / count[p], n
            while at > 0:
                q = places[i, at - 1]
                if q >= 0 and (total[q] / count[q], -token[q]) >= (mean, -token[p]):
                    break
                if at < n:
                    places[i, at] = q
                at -= 1
            if at < n:
                places[i, at] = p
    return places
