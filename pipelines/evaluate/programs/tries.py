"""Tries of token patterns: the form of programs that are learnt from firings.

A node is a pattern that ends at a row. Its children look at one more token, all at the same place
before the row. A row belongs to the deepest node that matches, and to one node only, since
siblings exclude each other. A node predicts one activation for all of its rows; a row without a
node is predicted 0.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from sae_harvest.common.cache import use_numba_cache

use_numba_cache()

from numba import njit  # noqa: E402

# columns of Tries.nodes
PARENT, BACK_OF, PATTERN, SPLIT, CHILD, CHILDREN, MASK, BEGIN, END, ROWS, FIRES = range(11)
COLUMNS = 11


@dataclass(frozen=True, eq=False)
class Tries:
    """The tries of consecutive latents."""

    first: int
    """The first latent."""

    starts: npt.NDArray[np.int64]
    """Where each latent's nodes begin [latents + 1]. Nodes without a parent come first."""

    nodes: npt.NDArray[np.int64]
    """The nodes [nodes, 11]: the parent's place, or -1; how far before the row the node's last
    token is; number of the pattern; how far before the row the children look, 0 without any;
    place and number of the children, sorted by pattern; mask; first and last-plus-one training
    firing; training rows that belong to the node; those on which the latent fires."""

    value: npt.NDArray[np.float64]
    """Activation that each node predicts [nodes]: the mean over its training rows."""

    threshold: npt.NDArray[np.float64]
    """Least prediction that counts as a firing, by latent: the one with the highest F1 on training
    rows; infinite without nodes [latents]."""

    def __len__(self) -> int:
        return len(self.threshold)


@njit(nogil=True, cache=True)
def nodes_of_rows(
    first: int,
    last: int,
    nodes: npt.NDArray[np.int64],
    number: npt.NDArray[np.int32],
    rows: npt.NDArray[np.int64],
) -> npt.NDArray[np.int32]:
    """Return the node that each row belongs to, counted from `first`; -1 without one: int32 [rows].

    Args:
        first, last: the latent's nodes.
        nodes: see `Tries`.
        number: see `Suffixes`.
        rows: numbers of rows.
    """
    found = np.empty(len(rows), np.int32)
    roots = first
    while roots < last and nodes[roots, PARENT] < 0:
        roots += 1
    patterns = nodes[first:last, PATTERN].copy()  # close together in memory
    for i in range(len(rows)):
        row, at = rows[i], np.int64(-1)
        begin, end, mask = np.int64(first), np.int64(roots), np.int64(0)
        while end > begin:
            pattern = number[mask, row]
            low, high = begin, end
            while low < high:
                middle = (low + high) // 2
                if patterns[middle - first] < pattern:
                    low = middle + 1
                else:
                    high = middle
            if low == end or patterns[low - first] != pattern:
                break
            at = low
            begin = nodes[at, CHILD]
            end = begin + nodes[at, CHILDREN]
            if end > begin:
                mask = nodes[at, MASK] | 1 << (nodes[at, SPLIT] - 1)
        found[i] = at - first if at >= 0 else -1
    return found
