"""The last tokens before every row, as numbered patterns, with their counts.

A pattern fixes the token of a row and any of the three tokens before it; it has wildcards between
them. A mask says which: bit 0 is the token before the row, bit 2 the third token before it.

    mask 0    B            mask 2    A * B        mask 5    A * C B
    mask 1    A B          mask 3    A C B        mask 7    A C D B

Each row has one pattern of each mask. Counts of patterns are all that learning and scoring need
of the rows on which a latent does not fire.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from sae_harvest.common.cache import use_numba_cache
from sae_harvest.pipelines.evaluate.intervals import CLUSTERS, clusters_of
from sae_harvest.pipelines.features.tables.rows import RowsPart, for_scores

use_numba_cache()

from numba import njit  # noqa: E402

BACK = 3  # tokens before the row
MASKS = 1 << BACK
START = -1  # in place of a token before the first of a context
MOST_ROWS = 1 << 24  # rows of a store that are used at most: about 1.5 GB
_MIX = 0x9E3779B97F4A7C15 - (1 << 64)  # 2^64 / golden ratio, as int64


@dataclass(frozen=True, eq=False)
class TokenRows:
    """Rows of a store, their tokens and their part in learning and scoring."""

    token: npt.NDArray[np.int32]
    """Token of each row [rows]."""

    train: npt.NDArray[np.bool_]
    """Mask of the rows that programs learn from [rows]: their documents are for explanations."""

    test: npt.NDArray[np.bool_]
    """Mask of the rows that programs are scored on [rows]: their documents are for scores."""

    cluster: npt.NDArray[np.uint8]
    """Cluster of the row's document, for intervals [rows]."""

    context_length: int
    """Tokens of a context."""

    text_begins: int = 0
    """Position of a context's first token of text: 1 after a BOS token, else 0."""

    @classmethod
    def of(cls, parts: Iterable[RowsPart], context_length: int, text_begins: int = 0) -> TokenRows:
        """Collect the rows of a store, 16,777,216 at most, from the parts that hold them."""
        columns: list[tuple[npt.NDArray[np.generic], ...]] = []
        left = MOST_ROWS - MOST_ROWS % context_length
        for token, _, text_hash, read in parts:
            scored = for_scores(text_hash)
            cluster = clusters_of(text_hash).astype(np.uint8)
            whole = token, read & ~scored, read & scored, cluster
            columns.append(tuple(column[:left] for column in whole))
            left -= len(columns[-1][0])
            if left == 0:
                break
        joined = [np.concatenate(column) for column in zip(*columns, strict=True)]
        return cls(*joined, context_length, text_begins)  # type: ignore

    def before(self, back: int) -> npt.NDArray[np.int32]:
        """Return the token so many places before each row [rows]; START before the context."""
        tokens = self.token.reshape(-1, self.context_length)
        moved = np.full_like(tokens, START)
        moved[:, back:] = tokens[:, : max(self.context_length - back, 0)]
        return moved.reshape(-1)


@dataclass(frozen=True, eq=False)
class Suffixes:
    """The patterns that end at rows. Numbers of patterns count through all masks."""

    rows: TokenRows
    """The rows."""

    number: npt.NDArray[np.int32]
    """Number of the pattern of each mask and row [8, rows]."""

    example: npt.NDArray[np.int64]
    """A row of each pattern [patterns]."""

    train: npt.NDArray[np.int32]
    """Training rows of each pattern [patterns]."""

    test_starts: npt.NDArray[np.int64]
    """Where each pattern's entries of `test_cluster` and `test_count` begin [patterns + 1]."""

    test_cluster: npt.NDArray[np.uint8]
    """Clusters with held-out rows of each pattern [entries]."""

    test_count: npt.NDArray[np.int32]
    """Held-out rows in each of these clusters [entries]."""

    longer_base: npt.NDArray[np.int64]
    """Where in `longer_starts` a mask extended by a position begins [8, 4]."""

    longer_starts: npt.NDArray[np.int64]
    """Where in `longer` the extensions of each pattern of that mask begin."""

    longer: npt.NDArray[np.int32]
    """Patterns with one more token and at least two training rows, most frequent first."""

    @property
    def cluster_rows(self) -> npt.NDArray[np.int64]:
        """Held-out rows in each cluster, int64 [256]."""
        return np.bincount(self.rows.cluster[self.rows.test], minlength=CLUSTERS)

    @classmethod
    def of(cls, rows: TokenRows) -> Suffixes:
        """Number and count all patterns of rows."""
        n = len(rows.token)
        number = np.empty((MASKS, n), np.int32)
        first = np.zeros(MASKS + 1, np.int64)
        before = [rows.before(back) for back in range(BACK + 1)]
        for mask in range(MASKS):
            back = mask.bit_length()  # the farthest token
            shorter = mask & ~(1 << (back - 1)) if mask else 0
            left = number[shorter] if mask else np.zeros(n, np.int32)
            found = _numbered(left, before[back], first[mask], number[mask])
            first[mask + 1] = first[mask] + found
        example = np.zeros(first[-1], np.int64)
        for mask in range(MASKS):
            example[number[mask][::-1]] = np.arange(n)[::-1]  # the first one
        train = np.zeros(first[-1], np.int32)
        for mask in range(MASKS):
            counts = np.bincount(number[mask][rows.train] - first[mask])
            train[first[mask] : first[mask] + len(counts)] = counts
        test = [
            _clusters_of_patterns(
                number[mask][rows.test] - np.int32(first[mask]),
                rows.cluster[rows.test],
                int(first[mask + 1] - first[mask]),
            )
            for mask in range(MASKS)
        ]
        entries = np.concatenate([np.diff(starts) for starts, _, _ in test])
        return cls(
            rows,
            number,
            example,
            train,
            np.concatenate([[0], np.cumsum(entries)]),
            np.concatenate([cluster for _, cluster, _ in test]),
            np.concatenate([count for _, _, count in test]),
            *_longer(number, first, example, train),
        )

    def token(self, pattern: int, back: int) -> int:
        """Return the token that a pattern fixes so many places before its row; START if none."""
        row = int(self.example[pattern])
        return START if row % self.rows.context_length < back else int(self.rows.token[row - back])


def _longer(
    number: npt.NDArray[np.int32],
    first: npt.NDArray[np.int64],
    example: npt.NDArray[np.int64],
    train: npt.NDArray[np.int32],
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.int32]]:
    """List the extensions of each pattern; see the fields of `Suffixes`."""
    base = np.zeros((MASKS, BACK + 1), np.int64)
    starts, lists = [], []
    n_starts = n_longer = 0
    for mask in range(MASKS):
        n = int(first[mask + 1] - first[mask])
        for back in range(1, BACK + 1):
            if mask >> (back - 1) & 1:
                continue
            longer = mask | 1 << (back - 1)
            some = np.arange(first[longer], first[longer + 1])
            some = some[train[some] >= 2]
            parent = number[mask][example[some]] - first[mask]
            order = np.lexsort((some, -train[some], parent))
            lists.append(some[order].astype(np.int32))
            counts = np.bincount(parent, minlength=n)
            starts.append(n_longer + np.concatenate([[0], np.cumsum(counts)]))
            base[mask, back] = n_starts
            n_starts += n + 1
            n_longer += len(some)
    return base, np.concatenate(starts).astype(np.int64), np.concatenate(lists)


@njit(nogil=True, cache=True)
def _numbered(
    left: npt.NDArray[np.int32],
    token: npt.NDArray[np.int32],
    first: int,
    number: npt.NDArray[np.int32],
) -> int:
    """Number distinct pairs (left, token) in the order of rows, from `first`; return how many."""
    size = 16
    while size < 2 * len(token):
        size *= 2
    at = np.full(size, -1, np.int64)  # open addressing: a row of the pair
    count = 0
    for row in range(len(token)):
        key = (np.int64(left[row]) << 32) | np.int64(token[row] & 0xFFFFFFFF)
        mixed = key * np.int64(_MIX)
        place = (mixed ^ (mixed >> 32)) & (size - 1)
        while at[place] >= 0 and (left[at[place]] != left[row] or token[at[place]] != token[row]):
            place = (place + 1) & (size - 1)
        if at[place] < 0:
            at[place] = row
            number[row] = first + count
            count += 1
        else:
            number[row] = number[at[place]]
    return count


@njit(nogil=True, cache=True)
def _clusters_of_patterns(
    pattern: npt.NDArray[np.int32], cluster: npt.NDArray[np.uint8], n_patterns: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.uint8], npt.NDArray[np.int32]]:
    """Count rows by pattern and cluster; return starts [n_patterns + 1], clusters and counts."""
    n = len(pattern)
    begins = np.zeros(257, np.int64)
    for c in cluster:
        begins[c + 1] += 1
    begins = np.cumsum(begins)
    by_cluster = np.empty(n, np.int64)
    for i in range(n):
        by_cluster[begins[cluster[i]]] = i
        begins[cluster[i]] += 1
    places = np.zeros(n_patterns + 1, np.int64)
    for p in pattern:
        places[p + 1] += 1
    places = np.cumsum(places)
    ordered = np.empty(n, np.int64)
    at = places.copy()
    for i in range(n):
        row = by_cluster[i]
        ordered[at[pattern[row]]] = row
        at[pattern[row]] += 1
    starts = np.zeros(n_patterns + 1, np.int64)
    clusters, counts = np.empty(n, np.uint8), np.empty(n, np.int32)
    used = 0
    for p in range(n_patterns):
        for place in range(places[p], places[p + 1]):
            c = cluster[ordered[place]]
            if used > starts[p] and clusters[used - 1] == c:
                counts[used - 1] += 1
            else:
                clusters[used], counts[used] = c, 1
                used += 1
        starts[p + 1] = used
    return starts, clusters[:used].copy(), counts[:used].copy()
