"""Programs learnt from stored firings: a token table, and a trie of suffixes with wildcards.

The first level has a node for each token on which the latent fires. A node is split by the token
at one place before the row if that lowers the squared error of the predicted activation. The
error is the one of leaving each row out: with n training rows, sum S and sum of squares Q,

    loo(n, S, Q) = (n / (n - 1))^2 (Q - S^2 / n)

so that a node of one row explains nothing. A child stays if it lowers the error by more than
0.03 % of the latent's sum of squares; its siblings that do not stay remain with their parent. Of
the three places, the one that lowers the error most is taken.

The rows on which a latent does not fire are counted by pattern (see `suffixes`), for all latents
at once.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from sae_harvest.common.cache import use_numba_cache
from sae_harvest.pipelines.evaluate.programs.firings import SplitFirings
from sae_harvest.pipelines.evaluate.programs.suffixes import BACK, Suffixes
from sae_harvest.pipelines.evaluate.programs.tries import (
    BACK_OF,
    BEGIN,
    CHILD,
    CHILDREN,
    COLUMNS,
    END,
    FIRES,
    MASK,
    PARENT,
    PATTERN,
    ROWS,
    SPLIT,
    Tries,
)

use_numba_cache()

from numba import njit  # noqa: E402

MIN_GAIN = 3e-4  # of a latent's sum of squares
_BITS = 32  # of a place among firings, behind the pattern in a key
_STEPS = 1 << 30  # gains are compared to this many steps, so that rounding decides nothing


def learn(suffixes: Suffixes, first: int, firings: SplitFirings, back: int = BACK) -> Tries:
    """Learn the programs of latents from their firings on training rows.

    Args:
        suffixes: patterns of the rows.
        first: the first latent.
        firings: the latents' firings on training rows.
        back: how many tokens before the row a program may look at; 0 learns token tables.
    """
    found = _learn(
        firings.starts,
        firings.row,
        firings.value.astype(np.float64),
        suffixes.number,
        suffixes.train,
        suffixes.longer_base,
        suffixes.longer_starts,
        suffixes.longer,
        back,
        MIN_GAIN,
    )
    return Tries(first, *found)


@njit(nogil=True, cache=True)
def _loo(n: float, s: float, q: float) -> float:
    """Return the squared error of predicting each row by the mean of the others."""
    if n < 2:
        return q
    return max(q - s * s / n, 0.0) * (n / (n - 1)) ** 2


@njit(nogil=True, cache=True)
def _sort_by_pattern(
    row: npt.NDArray[np.int64],
    value: npt.NDArray[np.float64],
    number: npt.NDArray[np.int32],
    keys: npt.NDArray[np.int64],
) -> None:
    """Sort firings by pattern, then by their order so far; `keys` gets the sorted patterns."""
    n = len(row)
    for i in range(n):
        keys[i] = np.int64(number[row[i]]) << _BITS | i
    keys[:n].sort()
    old_row, old_value = row.copy(), value.copy()
    for i in range(n):
        at = keys[i] & ((1 << _BITS) - 1)
        row[i], value[i] = old_row[at], old_value[at]
        keys[i] >>= _BITS


@njit(nogil=True, cache=True)
def _runs(
    row: npt.NDArray[np.int64],
    value: npt.NDArray[np.float64],
    number: npt.NDArray[np.int32],
    train: npt.NDArray[np.int32],
    keys: npt.NDArray[np.int64],
    pattern: npt.NDArray[np.int64],
    begin: npt.NDArray[np.int64],
    sums: npt.NDArray[np.float64],
) -> int:
    """Add up firings by pattern: their number, and in place pattern, begin, and n, S, Q.

    Patterns are in increasing order; `begin` is where their firings would begin in that order.
    """
    n, runs = len(row), 0
    for i in range(n):
        keys[i] = np.int64(number[row[i]]) << _BITS | i
    keys[:n].sort()
    for i in range(n):
        p, y = keys[i] >> _BITS, value[keys[i] & ((1 << _BITS) - 1)]
        if runs == 0 or pattern[runs - 1] != p:
            pattern[runs], begin[runs] = p, i
            sums[runs, 0], sums[runs, 1], sums[runs, 2] = train[p], 0.0, 0.0
            runs += 1
        sums[runs - 1, 1] += y
        sums[runs - 1, 2] += y * y
    begin[runs] = n
    return runs


@njit(nogil=True, cache=True)
def _without_firings(
    known: npt.NDArray[np.int64],
    node: npt.NDArray[np.float64],
    longer: npt.NDArray[np.int32],
    train: npt.NDArray[np.int32],
    least: float,
    pattern: npt.NDArray[np.int64],
    sums: npt.NDArray[np.float64],
) -> int:
    """Append patterns on which the latent never fires, if to split them off may be worth it.

    Args:
        known: sorted patterns with firings; they are left out.
        node: n, S, Q of the node.
        longer: patterns of one more token, most frequent first.
        least: least gain.

    Returns:
        the number of patterns in `pattern` and `sums`, with those of `known`.
    """
    n, mean, count = node[0], node[1] / node[0], len(known)
    for p in longer:
        rows = train[p]
        if rows < n and rows * mean * mean * 4 * n / (n - rows) < least:
            break  # all later ones have fewer rows; 4: at most (n / (n - 1))^2
        at = np.searchsorted(known, p)
        if at < len(known) and known[at] == p:
            continue
        if count == len(pattern):
            break
        pattern[count] = p
        sums[count] = 0.0
        sums[count, 0] = rows
        count += 1
    return count


@njit(nogil=True, cache=True)
def _chosen(
    node: npt.NDArray[np.float64],
    sums: npt.NDArray[np.float64],
    least: float,
) -> tuple[npt.NDArray[np.int64], float]:
    """Choose the children of a node, best first; return them and how much they lower the error.

    Args:
        node: n, S, Q of the node.
        sums: n, S, Q of each candidate.
        least: least gain of a child.
    """
    error = _loo(node[0], node[1], node[2])
    ranked, kept = np.empty(len(sums), np.int64), 0
    for i in range(len(sums)):
        own = sums[i]
        rest = _loo(node[0] - own[0], node[1] - own[1], node[2] - own[2])
        gain = error - rest - _loo(own[0], own[1], own[2])
        if own[0] >= 2 and gain > least:
            step = np.int64(_STEPS * (1 - gain / error)) >> 10
            ranked[kept] = step << _BITS | i
            kept += 1
    ranked = np.sort(ranked[:kept])
    rest, total = node.copy(), 0.0
    chosen = np.empty(len(ranked), np.int64)
    n_chosen = 0
    for key in ranked:
        place = key & ((1 << _BITS) - 1)
        own = sums[place]
        left = _loo(rest[0] - own[0], rest[1] - own[1], rest[2] - own[2])
        gain = _loo(rest[0], rest[1], rest[2]) - left - _loo(own[0], own[1], own[2])
        if gain > least:
            rest -= own
            total += gain
            chosen[n_chosen] = place
            n_chosen += 1
    return chosen[:n_chosen], total


@njit(nogil=True, cache=True)
def _grown(array: npt.NDArray[Any], rows: int) -> npt.NDArray[Any]:
    """Return the array with room for so many rows."""
    if rows <= len(array):
        return array
    larger = np.empty((max(rows, 2 * len(array)), array.shape[1]), array.dtype)
    larger[: len(array)] = array
    return larger


@njit(nogil=True, cache=True)
def _learn(
    starts: npt.NDArray[np.int64],
    all_row: npt.NDArray[np.int64],
    all_value: npt.NDArray[np.float64],
    number: npt.NDArray[np.int32],
    train: npt.NDArray[np.int32],
    longer_base: npt.NDArray[np.int64],
    longer_starts: npt.NDArray[np.int64],
    longer: npt.NDArray[np.int32],
    back: int,
    min_gain: float,
) -> tuple[
    npt.NDArray[np.int64],
    npt.NDArray[np.int64],
    npt.NDArray[np.float64],
    npt.NDArray[np.float64],
]:
    """Learn latent by latent; see `learn` and the fields of `Tries`."""
    latents = len(starts) - 1
    most = np.diff(starts).max() if latents else 0
    room = most + 4096  # runs with firings, and candidates without
    keys, pattern = np.empty(most, np.int64), np.empty(room, np.int64)
    begin, sums = np.empty(room + 1, np.int64), np.empty((room, 3))
    first_of_mask = number[:, 0].copy()  # the first row has the first pattern of each mask
    node_starts, thresholds = np.zeros(latents + 1, np.int64), np.full(latents, np.inf)
    nodes, totals = np.empty((1024, COLUMNS), np.int64), np.empty((1024, 3))
    count = 0
    for latent in range(latents):
        row = all_row[starts[latent] : starts[latent + 1]].copy()
        value = all_value[starts[latent] : starts[latent + 1]].copy()
        least = min_gain * (value * value).sum()
        _sort_by_pattern(row, value, number[0], keys)
        runs = _runs(row, value, number[0], train, keys, pattern, begin, sums)
        nodes, totals = _grown(nodes, count + runs), _grown(totals, count + runs)
        at = count
        for i in range(runs):
            nodes[count] = 0
            nodes[count, PARENT], nodes[count, PATTERN] = -1, pattern[i]
            nodes[count, BEGIN], nodes[count, END] = begin[i], begin[i + 1]
            totals[count] = sums[i]
            count += 1
        while at < count and back > 0:
            node, total = nodes[at].copy(), totals[at].copy()
            here = slice(node[BEGIN], node[END])
            best, split, children = 0.0, 0, np.empty(0, np.int64)
            error = _loo(total[0], total[1], total[2])
            places = back if error > least and total[0] >= 2 else 0
            for place in range(1, places + 1):
                if node[MASK] >> (place - 1) & 1:
                    continue
                mask = node[MASK] | 1 << (place - 1)
                runs = _runs(
                    row[here], value[here], number[mask], train, keys, pattern, begin, sums
                )
                list_at = longer_base[node[MASK], place]
                list_at += node[PATTERN] - first_of_mask[node[MASK]]
                more = longer[longer_starts[list_at] : longer_starts[list_at + 1]]
                candidates = _without_firings(
                    pattern[:runs], total, more, train, least, pattern, sums
                )
                chosen, gain = _chosen(total, sums[:candidates], least)
                if gain > best * (1 + 1e-9):
                    best, split = gain, place
                    children = np.sort(pattern[chosen])
            if split:
                mask = node[MASK] | 1 << (split - 1)
                _sort_by_pattern(row[here], value[here], number[mask], keys)
                inside = keys[: node[END] - node[BEGIN]]
                nodes = _grown(nodes, count + len(children))
                totals = _grown(totals, count + len(children))
                nodes[at, SPLIT], nodes[at, CHILD] = split, count
                nodes[at, CHILDREN] = len(children)
                for p in children:
                    nodes[count] = 0
                    nodes[count, PARENT], nodes[count, PATTERN] = at, p
                    nodes[count, BACK_OF], nodes[count, MASK] = split, mask
                    low = node[BEGIN] + np.searchsorted(inside, p)
                    high = node[BEGIN] + np.searchsorted(inside, p + 1)
                    nodes[count, BEGIN], nodes[count, END] = low, high
                    some_value = value[low:high]
                    totals[count, 0], totals[count, 1] = train[p], some_value.sum()
                    totals[count, 2] = (some_value * some_value).sum()
                    count += 1
            at += 1
        node_starts[latent + 1] = count
        thresholds[latent] = _close(nodes, totals, node_starts[latent], count, len(row))
    value = totals[:count, 1].copy()
    return node_starts, nodes[:count].copy(), value, thresholds


@njit(nogil=True, cache=True)
def _close(
    nodes: npt.NDArray[np.int64],
    totals: npt.NDArray[np.float64],
    first: int,
    last: int,
    firings: int,
) -> float:
    """Take the children's rows from each node, and put its mean in the place of its sum.

    Returns:
        the least prediction that counts as a firing: the one with the highest F1.
    """
    for i in range(first, last):
        own, n, s = nodes[i, END] - nodes[i, BEGIN], totals[i, 0], totals[i, 1]
        rest_n, rest_s = n, s
        for child in range(nodes[i, CHILD], nodes[i, CHILD] + nodes[i, CHILDREN]):
            own -= nodes[child, END] - nodes[child, BEGIN]
            rest_n -= totals[child, 0]
            rest_s -= totals[child, 1]
        nodes[i, ROWS], nodes[i, FIRES] = np.int64(rest_n), own
        # exactly 0 without firings; a node that has no rows of its own keeps its mean
        totals[i, 2] = (rest_s / rest_n if own else 0.0) if rest_n else s / n
    for i in range(first, last):
        totals[i, 1] = totals[i, 2]
    order = np.argsort(-totals[first:last, 1]) + first
    best, threshold, rows, hits = 0.0, np.inf, 0, 0
    for at in range(len(order)):
        i = order[at]
        rows += nodes[i, ROWS]
        hits += nodes[i, FIRES]
        ends = at + 1 == len(order) or totals[order[at + 1], 1] < totals[i, 1]
        f1 = 2 * hits / (rows + firings) if rows else 0.0
        if ends and f1 > best and totals[i, 1] > 0:
            best, threshold = f1, totals[i, 1]
    return threshold
