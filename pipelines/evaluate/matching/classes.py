"""The fate of each latent of A in B, from counts of rows.

    same       each latent lies in the other
    split      a latent of A without such a partner is explained by a set of B's latents
    merged     a latent of B without such a partner is explained by a set of A's latents
    absorbed   a latent a has the same latent p, its parent, in the other dictionary; there another
               latent, the child, lies in a, and on at least half of the rows on which both fire p
               is silent: the child fires where its parent should fire and does not
    died       a latent of A in no such pair
    born       a latent of B in no such pair

`joint` defines when a latent lies in another, `sets` the set of a latent. Swapping A and B swaps
split and merged, died and born, and `child`; nothing else.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np
import numpy.typing as npt

from sae_harvest.pipelines.evaluate.matching.joint import MIN_FIRINGS, Ints, Joint
from sae_harvest.pipelines.evaluate.matching.sets import Sets

SAME, SPLIT, MERGED, ABSORBED, DIED, BORN = range(6)
CLASSES = ("same", "split", "merged", "absorbed", "died", "born")
NO_CHILD, CHILD_A, CHILD_B = range(3)
CHILDREN = (None, "A", "B")
NONE = -1


@dataclass(frozen=True, eq=False)
class Pairs:
    """Pairs of latents with their class, sorted by latent of A, then of B; -1 stands for none."""

    a: Ints
    """Latent of A. Of `born`, the nearest one, if any fires with it."""

    b: Ints
    """Latent of B. Of `died`, the nearest one, if any fires with it."""

    kind: Ints
    """Index in CLASSES."""

    child: Ints
    """Index in CHILDREN: the dictionary of the narrower latent of split, merged and absorbed."""

    both: Ints
    """Rows on which both fire."""

    gain: Ints
    """Rows that the child adds to its set; of split and merged."""

    parent: Ints
    """The parent that is silent; of absorbed. A latent of the child's dictionary."""

    parent_silent: Ints
    """Rows on which both fire and the parent does not; for absorbed latents."""

    def __len__(self) -> int:
        return len(self.a)

    def take(self, places: npt.NDArray[np.int64]) -> Pairs:
        """Return the pairs at these places."""
        return Pairs(*(getattr(self, field.name)[places] for field in fields(self)))


@dataclass(frozen=True, eq=False)
class Fates:
    """Number of latents of each fate; a latent is counted once, in its first class."""

    a: dict[str, int]
    """Latents of A: same, split, merged, absorbed, died, rare, dead."""

    b: dict[str, int]
    """Latents of B: same, split, merged, absorbed, born, rare, dead."""


def classed(joint: Joint, of_a: Sets, of_b: Sets) -> Pairs:
    """Return all pairs with a class.

    Args:
        joint: joint firing counts.
        of_a: sets of A's latents in members of B.
        of_b: sets of B's latents in members of A.
    """
    same = np.flatnonzero(joint.a_in_b & joint.b_in_a)
    m = len(joint.n_b)
    alike = joint.a[same] * m + joint.b[same]
    parts = [_pairs(SAME, NO_CHILD, joint.a[same], joint.b[same], joint.both[same])]
    split, absorbed = _families(of_a, joint, joint.n_a)
    absorbed &= ~np.isin(of_a.owner * m + of_a.member, alike)
    parts += _of_sets(of_a, split, absorbed, SPLIT, CHILD_B)
    merged, absorbed = _families(of_b, joint, joint.n_b)
    absorbed &= ~np.isin(of_b.member * m + of_b.owner, alike)
    parts += [_swapped(part) for part in _of_sets(of_b, merged, absorbed, MERGED, CHILD_A)]
    known = np.zeros(len(joint.n_a), np.bool_), np.zeros(len(joint.n_b), np.bool_)
    for part in parts:
        known[0][part.a] = known[1][part.b] = True
    died = np.flatnonzero(~known[0] & (joint.n_a >= MIN_FIRINGS))
    parts.append(_pairs(DIED, NO_CHILD, died, joint.best_b[died], joint.best_b_both[died]))
    born = np.flatnonzero(~known[1] & (joint.n_b >= MIN_FIRINGS))
    parts.append(_pairs(BORN, NO_CHILD, joint.best_a[born], born, joint.best_a_both[born]))
    columns = (np.concatenate([getattr(p, field.name) for p in parts]) for field in fields(Pairs))
    pairs = Pairs(*columns)
    return pairs.take(np.lexsort((pairs.kind, pairs.b, pairs.a)))


def fates(joint: Joint, pairs: Pairs) -> Fates:
    """Count what became of the latents."""
    found = []
    for fired, own, gone in ((joint.n_a, pairs.a, DIED), (joint.n_b, pairs.b, BORN)):
        first = np.full(len(fired), len(CLASSES), np.int64)
        for kind in (gone, ABSORBED, MERGED, SPLIT, SAME):
            first[own[(pairs.kind == kind) & (own != NONE)]] = kind
        first[fired < MIN_FIRINGS] = len(CLASSES)  # the nearest of a latent that died or was born
        counts = np.bincount(first, minlength=len(CLASSES) + 1)
        wanted = (SAME, SPLIT, MERGED, ABSORBED, gone)
        by_name = {CLASSES[kind]: int(counts[kind]) for kind in wanted}
        dead = int((fired == 0).sum())
        found.append(by_name | {"rare": int((fired < MIN_FIRINGS).sum()) - dead, "dead": dead})
    return Fates(*found)


def _families(
    sets: Sets, joint: Joint, fired: Ints
) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
    """Return which members belong to a set that explains its latent, and which are absorbing."""
    owner = sets.owner
    unmatched = sets.main == NONE
    explained = (unmatched & sets.explains(joint, fired))[owner]
    both_half = 2 * sets.without_main >= sets.both
    return explained, ~unmatched[owner] & both_half


def _of_sets(
    sets: Sets,
    explained: npt.NDArray[np.bool_],
    absorbed: npt.NDArray[np.bool_],
    kind: int,
    child: int,
) -> list[Pairs]:
    """Return pairs (latent, member) of sets that explain a latent, and of absorbing members."""
    owner = sets.owner
    return [
        _pairs(
            kind, child, owner[explained], sets.member[explained], sets.both[explained],
            gain=sets.gain[explained],
        ),
        _pairs(
            ABSORBED, child, owner[absorbed], sets.member[absorbed], sets.both[absorbed],
            parent=sets.main[owner[absorbed]], parent_silent=sets.without_main[absorbed],
        ),
    ]  # fmt: skip


def _pairs(kind: int, child: int, a: Ints, b: Ints, both: Ints, **more: Ints) -> Pairs:
    nothing = np.full(len(a), NONE, np.int64)
    given = {"gain": nothing, "parent": nothing, "parent_silent": nothing} | more
    return Pairs(
        a, b, np.full(len(a), kind, np.int64), np.full(len(a), child, np.int64), both, **given
    )


def _swapped(pairs: Pairs) -> Pairs:
    return Pairs(
        pairs.b,
        pairs.a,
        pairs.kind,
        pairs.child,
        pairs.both,
        pairs.gain,
        pairs.parent,
        pairs.parent_silent,
    )
