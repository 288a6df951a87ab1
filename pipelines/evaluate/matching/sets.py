"""Latents of one dictionary that together explain a latent of the other.

The set of a latent has all latents of the other dictionary that lie in it, in the
order of joint firings. Each member gains the rows of the latent on which it fires and no earlier
member does (greedy cover in a fixed order). With U the rows on which any member fires,

    coverage    rows of the latent in U, over all rows of the latent
    precision   rows of the latent in U, over all rows of U
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from numba import get_num_threads

from sae_harvest.pipelines.evaluate.matching import kernels
from sae_harvest.pipelines.evaluate.matching.joint import Ints, Joint
from sae_harvest.pipelines.evaluate.matching.spans import Spans


@dataclass(frozen=True, eq=False)
class Sets:
    """The set of each latent of one dictionary, in members of the other dictionary."""

    starts: Ints
    """[n + 1], where each latent's members begin."""

    member: Ints
    """[members], latents of the other dictionary, by falling joint firings."""

    both: Ints
    """[members], rows on which latent and member fire."""

    gain: Ints
    """[members], rows of the latent on which the member fires and no earlier member does."""

    main: Ints
    """[n], the latent of the other dictionary that is the same as this one and has the highest
    Jaccard index; -1: none."""

    without_main: Ints
    """[members], rows on which latent and member fire and `main` does not."""

    outside: Ints
    """[n], rows on which a member fires and the latent does not."""

    @property
    def owner(self) -> Ints:
        """[members], the latent that each member belongs to."""
        return np.repeat(np.arange(len(self.starts) - 1), np.diff(self.starts))

    @property
    def covered(self) -> Ints:
        """[n], rows of the latent on which a member fires."""
        return np.bincount(self.owner, self.gain, len(self.starts) - 1).astype(np.int64)

    @property
    def union(self) -> Ints:
        """[n], rows on which a member fires."""
        return self.covered + self.outside

    def explains(self, joint: Joint, fired: Ints) -> npt.NDArray[np.bool_]:
        """Return whether each latent's set lies in it, and it in the set.

        Args:
            joint: joint firing counts of the same firings.
            fired: rows on which each latent fires [n].
        """
        covered, union = self.covered, self.union
        return joint.lies_in(covered, fired, union) & joint.lies_in(covered, union, fired)


def set_counts(
    spans: Spans, joint: Joint, progress: Callable[[int, int], None] = lambda done, total: None
) -> tuple[Sets, Sets]:
    """Count the sets of A's latents in members of B, and of B's latents in members of A.

    The firings are read once. The counts are exact over all common rows.

    Args:
        spans: the firings.
        joint: joint firing counts of the same firings.
        progress: called with spans done and all.
    """
    same = joint.a_in_b & joint.b_in_a
    either = joint.n_a[joint.a] + joint.n_b[joint.b] - joint.both
    jaccard = joint.both / np.maximum(either, 1)
    of_a = _empty(joint.a, joint.b, joint.both, joint.b_in_a, same, jaccard, len(joint.n_a))
    of_b = _empty(joint.b, joint.a, joint.both, joint.a_in_b, same, jaccard, len(joint.n_b))
    progress(0, len(spans))
    for done, span in enumerate(spans, start=1):
        a, b = (span.a.starts, span.a.row), (span.b.starts, span.b.row)
        for sets, own, other in ((of_a, a, b), (of_b, b, a)):
            kernels.add_sets(
                *own,
                *other,
                span.last - span.first,
                sets.starts,
                sets.member,
                sets.main,
                sets.gain,
                sets.without_main,
                sets.outside,
                get_num_threads(),
            )
        progress(done, len(spans))
    return of_a, of_b


def _empty(
    own: Ints,
    other: Ints,
    both: Ints,
    inside: npt.NDArray[np.bool_],
    same: npt.NDArray[np.bool_],
    jaccard: npt.NDArray[np.float64],
    n: int,
) -> Sets:
    """Return sets whose rows are not counted yet, of pairs (own, other) with `inside`."""
    places = np.flatnonzero(inside)
    places = places[np.lexsort((other[places], -both[places], own[places]))]
    starts = np.zeros(n + 1, np.int64)
    np.cumsum(np.bincount(own[places], minlength=n), out=starts[1:])
    main = np.full(n, -1, np.int64)
    ranked = np.flatnonzero(same)
    ranked = ranked[np.lexsort((-other[ranked], jaccard[ranked]))]
    main[own[ranked]] = other[ranked]  # the last one written stays
    zeros = np.zeros(len(places), np.int64)
    return Sets(
        starts,
        other[places],
        both[places],
        zeros,
        main,
        zeros.copy(),
        np.zeros(n, np.int64),
    )
