"""Firings of two dictionaries made by hand, and a slow comparison of them on dense matrices."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np

from sae_harvest.pipelines.evaluate.matching.classes import CHILDREN, CLASSES, Pairs, classed
from sae_harvest.pipelines.evaluate.matching.joint import OVERLAP, Joint, joint_counts
from sae_harvest.pipelines.evaluate.matching.sets import Sets, set_counts
from sae_harvest.pipelines.evaluate.matching.spans import Span
from sae_harvest.pipelines.features.encoding.firings import Firings

LENGTH = 8  # tokens of a context


class HandSpans:
    """Spans of so many rows, of dense activations [rows, latents] of A and of B."""

    def __init__(self, a: np.ndarray, b: np.ndarray, each: int | None = None) -> None:
        self._a, self._b, self._each = a, b, each or len(a)
        sides = [SimpleNamespace(n_latents=x.shape[1]) for x in (a, b)]
        self.rows = SimpleNamespace(a=sides[0], b=sides[1], context_length=LENGTH)

    def __len__(self) -> int:
        return -(-len(self._a) // self._each)

    def __iter__(self) -> Any:
        for first in range(0, len(self._a), self._each):
            last = min(first + self._each, len(self._a))
            found = [firings_of(x[first:last], first) for x in (self._a, self._b)]
            yield Span(first, last, *found, n_common=last - first)


def firings_of(dense: np.ndarray, first: int = 0) -> Firings:
    """The firings of dense activations [rows, latents]."""
    latent, row = np.nonzero(dense.T)
    starts = np.searchsorted(latent, np.arange(dense.shape[1] + 1)).astype(np.int64)
    return Firings(first, 0, starts, row.astype(np.int32), dense[row, latent].astype(np.float32))


def compared(
    a: np.ndarray, b: np.ndarray, each: int | None = None, overlap: float = OVERLAP
) -> tuple[Joint, Sets, Sets, Pairs]:
    """Compare dense activations, in spans of so many rows."""
    spans: Any = HandSpans(np.asarray(a, float), np.asarray(b, float), each)
    joint = joint_counts(spans, overlap)
    of_a, of_b = set_counts(spans, joint)
    return joint, of_a, of_b, classed(joint, of_a, of_b)


def listed(pairs: Pairs) -> set[tuple[int, int, str, str | None]]:
    """The pairs as (a, b, class, child); -1 for the nearest of a latent that died or was born."""
    found = set()
    for a, b, kind, child in zip(pairs.a, pairs.b, pairs.kind, pairs.child, strict=True):
        name = CLASSES[kind]
        a = -1 if name == "born" else int(a)
        b = -1 if name == "died" else int(b)
        found.add((a, b, name, CHILDREN[child]))
    return found


def fires(n_rows: int, *rows: Any) -> np.ndarray:
    """Dense firings [rows, latents], from the rows of each latent."""
    dense = np.zeros((n_rows, len(rows)), bool)
    for latent, some in enumerate(rows):
        dense[list(some), latent] = True
    return dense


def slow(a: np.ndarray, b: np.ndarray) -> set[tuple[int, int, str, str | None]]:
    """The classes from dense booleans, pair by pair, as docs/diff.md defines them."""
    a, b = a > 0, b > 0
    same = {(i, j) for i in range(a.shape[1]) for j in range(b.shape[1]) if _same(a[:, i], b[:, j])}
    found = {(i, j, "same", None) for i, j in same}
    for x, y, turned in ((a, b, False), (b, a, True)):
        for i in range(x.shape[1]):
            mine = x[:, i]
            members = [j for j in range(y.shape[1]) if _lies_in(y[:, j], mine)]
            partners = [j for j in range(y.shape[1]) if ((j, i) if turned else (i, j)) in same]
            if partners:
                scores = [(mine & y[:, j]).sum() / (mine | y[:, j]).sum() for j in partners]
                parent = y[:, partners[int(np.argmax(scores))]]
                for j in members:
                    both = mine & y[:, j]
                    if j not in partners and 2 * (both & ~parent).sum() >= both.sum():
                        pair = (j, i) if turned else (i, j)
                        found.add((*pair, "absorbed", "A" if turned else "B"))
            elif members and _same(y[:, members].any(axis=1), mine):
                for j in members:
                    pair = (j, i, "merged", "A") if turned else (i, j, "split", "B")
                    found.add(pair)
    for x, place, name in ((a, 0, "died"), (b, 1, "born")):
        for i in range(x.shape[1]):
            if x[:, i].sum() >= 10 and i not in {pair[place] for pair in found}:
                found.add((i, -1, name, None) if name == "died" else (-1, i, name, None))
    return found


def _lies_in(x: np.ndarray, y: np.ndarray) -> bool:
    """Whether most rows of x are rows of y, beyond chance."""
    if x.sum() < 10 or y.sum() < 10:
        return False
    share, density = (x & y).sum() / x.sum(), y.mean()
    return bool(density < 1 and (share - density) / (1 - density) >= 0.5 - 1e-12)


def _same(x: np.ndarray, y: np.ndarray) -> bool:
    return _lies_in(x, y) and _lies_in(y, x)
