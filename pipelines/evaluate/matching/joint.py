"""Pairs of latents of two dictionaries of which one lies in the other.

With n_a and n_b the common rows on which two latents fire, `both` the rows on which both do, and N
all common rows,

    coverage   both / n_a, the share of a's rows on which b fires
    precision  both / n_b, the share of b's rows on which a fires

A latent that fires on half of all rows covers half of every latent by chance. So a share s of rows
on which a latent of density d fires counts as (s - d) / (1 - d), which is 0 by chance and 1 if all
are covered; for sparse latents it is s itself. If it is at least `overlap`, the latent lies in the
other: most of its rows are rows of the other.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from sae_harvest.pipelines.evaluate.matching import kernels
from sae_harvest.pipelines.evaluate.matching.spans import Spans
from sae_harvest.pipelines.features.counting.cofiring import transposed

OVERLAP = 0.5
MIN_FIRINGS = 10  # a latent that fires on fewer common rows is too rare to be compared
TILE = 1 << 25  # counts of a tile, 8 bytes each
LINES = 64  # lines of a tile that are looked at together

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Joint:
    """Joint firing counts of two dictionaries on their common rows."""

    overlap: float
    """Share of rows that counts as most of them."""

    n_rows: int
    """Common rows."""

    n_a: Ints
    """[latents of A], common rows on which each fires."""

    n_b: Ints
    """[latents of B]."""

    a: Ints
    """[pairs], latents of A, increasing. Of the pairs in which one latent lies in the other."""

    b: Ints
    """[pairs], latents of B, increasing for each latent of A."""

    both: Ints
    """[pairs], common rows on which both fire."""

    best_b: Ints
    """[latents of A], latent of B with the highest Jaccard index; -1 if none fires with it."""

    best_a: Ints
    """[latents of B], the same for A."""

    best_b_both: Ints
    """[latents of A], rows on which both fire."""

    best_a_both: Ints
    """[latents of B], rows on which both fire."""

    @property
    def a_in_b(self) -> npt.NDArray[np.bool_]:
        """Pairs whose latent of A lies in that of B."""
        return self.lies_in(self.both, self.n_a[self.a], self.n_b[self.b])

    @property
    def b_in_a(self) -> npt.NDArray[np.bool_]:
        """Pairs whose latent of B lies in that of A."""
        return self.lies_in(self.both, self.n_b[self.b], self.n_a[self.a])

    def lies_in(self, both: Ints, fired: Ints, other: Ints) -> npt.NDArray[np.bool_]:
        """Return whether latents lie in others; see the function `lies_in`."""
        return lies_in(both, fired, other, self.n_rows, self.overlap)


def lies_in(
    both: Ints, fired: Ints, other: Ints, n_rows: int, overlap: float
) -> npt.NDArray[np.bool_]:
    """Return whether a latent lies in another: most of its rows are rows of it, beyond chance.

    Args:
        both: rows on which both fire.
        fired: rows on which the latent fires.
        other: rows on which the other one fires.
        n_rows: all rows.
        overlap: share of rows that counts as most of them, above 0, at most 1.
    """
    density = other / max(n_rows, 1)
    needed = fired * (density + overlap * (1 - density))
    return (both >= needed) & (fired >= MIN_FIRINGS) & (other >= MIN_FIRINGS)


def joint_counts(
    spans: Spans,
    overlap: float = OVERLAP,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Joint:
    """Count joint firings of all pairs, exact over all common rows.

    The counts of some latents of A with all of B are in memory at a time; for each such tile the
    firings are read once.

    Args:
        spans: the firings.
        overlap: share of rows that counts as most of them.
        progress: called with latents of A done and all.
    """
    n, m = spans.rows.a.n_latents, spans.rows.b.n_latents
    height = max(1, min(n, TILE // m))
    n_a, n_b = np.zeros(n, np.int64), np.zeros(m, np.int64)
    n_rows, pairs = 0, list[tuple[Ints, Ints, Ints]]()
    best_b, best_a = _Best(n), _Best(m)
    progress(0, n)
    for first in range(0, n, height):
        counts = np.zeros((min(height, n - first), m), np.int64)
        for span in spans:
            by_row = transposed(span.b.starts, span.b.row, span.last - span.first)
            kernels.add_joint(first, span.a.starts, span.a.row, *by_row, counts)
            if first == 0:
                n_a += np.diff(span.a.starts)
                n_b += np.diff(span.b.starts)
                n_rows += span.n_common
        for low in range(0, len(counts), LINES):
            some = counts[low : low + LINES]
            own = np.arange(first + low, first + low + len(some))
            pairs.append(_linked(some, own, n_a, n_b, n_rows, overlap))
            either = n_a[own, None] + n_b - some
            jaccard = some / np.maximum(either, 1)
            best_b.offer(own, jaccard.argmax(1), jaccard.max(1), some)
            best_a.offer(np.arange(m), own[jaccard.argmax(0)], jaccard.max(0), some.T, own[0])
        progress(first + len(counts), n)
    a, b, both = (np.concatenate(column) for column in zip(*pairs, strict=True))
    return Joint(
        overlap,
        n_rows,
        n_a,
        n_b,
        a,
        b,
        both,
        best_b.latent,
        best_a.latent,
        best_b.both,
        best_a.both,
    )


def _linked(
    counts: Ints, own: Ints, n_a: Ints, n_b: Ints, n_rows: int, overlap: float
) -> tuple[Ints, Ints, Ints]:
    """Return the linked pairs of some lines of counts: latents of A, of B, joint firings."""
    line, b = np.nonzero(counts)
    both, a = counts[line, b], own[line]
    linked = lies_in(both, n_a[a], n_b[b], n_rows, overlap)
    linked |= lies_in(both, n_b[b], n_a[a], n_rows, overlap)
    return a[linked], b[linked], both[linked]


class _Best:
    """The latent with the highest Jaccard index for each of n; of equal ones, the first."""

    def __init__(self, n: int) -> None:
        self.latent, self.both = np.full(n, -1, np.int64), np.zeros(n, np.int64)
        self._jaccard = np.zeros(n)

    def offer(
        self,
        of: Ints,
        other: Ints,
        jaccard: npt.NDArray[np.float64],
        counts: Ints,
        first: int = 0,
    ) -> None:
        """Offer other[i] with jaccard[i] to of[i]; counts [of, others from `first` on]."""
        better = jaccard > self._jaccard[of]
        here = of[better]
        self.latent[here], self._jaccard[here] = other[better], jaccard[better]
        self.both[here] = counts[better, other[better] - first]
