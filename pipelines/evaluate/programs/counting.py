"""The fit of predictions to activations on held-out rows: sums by cluster of documents.

A program gives the same prediction to all rows of a node, so that rows on which a latent does not
fire need no visit: their counts by node and cluster are enough. A row without a node is predicted
0. With x the prediction and y the activation of a row, ranks being midranks over all held-out
rows:

    precision, recall, F1    of x >= threshold as a prediction of y > 0
    AUPRC                    sum over distinct x, falling, of (R - R before) P: average precision
    Pearson, Spearman        correlation of x and y, and of their ranks

AUPRC is no function of a few sums, so its interval uses the derivative of it by the weight of each
row, summed by cluster: the linear part of the change when documents are drawn again.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from sae_harvest.common.cache import use_numba_cache
from sae_harvest.pipelines.evaluate.intervals import CLUSTERS, Floats

use_numba_cache()

from numba import njit  # noqa: E402

# columns of sums by cluster; X predictions, Y activations, R their ranks, centred
N, POSITIVE, PREDICTED, HITS, X, XX, Y, YY, XY, RX, RXX, RY, RYY, RXY, SLOPE = range(15)
SUMS = 15
DECILES = 10
METRICS = ("precision", "recall", "f1", "auprc", "pearson", "spearman")


@njit(nogil=True, cache=True)
def count(
    value: npt.NDArray[np.float64],
    parent: npt.NDArray[np.int64],
    entry_first: npt.NDArray[np.int64],
    entry_last: npt.NDArray[np.int64],
    entry_cluster: npt.NDArray[np.uint8],
    entry_count: npt.NDArray[np.int32],
    threshold: float,
    node: npt.NDArray[np.int32],
    activation: npt.NDArray[np.float32],
    order: npt.NDArray[np.int64],
    cluster: npt.NDArray[np.uint8],
    cluster_rows: npt.NDArray[np.int64],
    sums: npt.NDArray[np.float64],
    recall: npt.NDArray[np.float32],
) -> float:
    """Add up the held-out rows of one latent; return its AUPRC.

    Args:
        value: prediction of each node [nodes].
        parent: parent of each node, or -1; parents come first [nodes].
        entry_first, entry_last: the node's entries; they count rows of its children too [nodes].
        entry_cluster, entry_count: held-out rows of patterns by cluster [entries].
        threshold: least prediction that counts as a firing, above 0.
        node: node of each held-out firing, or -1 [firings].
        activation: float32 [firings].
        order: places of the firings by increasing activation; equal ones by row [firings].
        cluster: cluster of each firing's document [firings].
        cluster_rows: held-out rows in each cluster [256].
        sums: gets the sums, float64 [256, 15].
        recall: gets the recall of each tenth of the firings, weakest first, float32 [10].
    """
    nodes, fired = len(value), len(node)
    total = cluster_rows.sum()
    rows, hits = np.zeros(nodes + 1, np.int64), np.zeros(nodes + 1, np.int64)  # last: no node
    for i in range(nodes):
        for e in range(entry_first[i], entry_last[i]):
            rows[i] += entry_count[e]
            if parent[i] >= 0:
                rows[parent[i]] -= entry_count[e]
    rows[nodes] = total - rows[:nodes].sum()
    for f in range(fired):
        hits[node[f]] += 1  # -1 is the last
    predictions = np.append(value, 0.0)
    rank_x, slope, bonus, auprc = _ranked(predictions, rows, hits, total, fired)
    for c in range(CLUSTERS):  # as if no row had a node
        n, rank = cluster_rows[c], rank_x[nodes]
        sums[c, N], sums[c, SLOPE] = n, n * slope[nodes]
        sums[c, RX], sums[c, RXX] = n * rank, n * rank * rank
    for i in range(nodes):  # its rows leave its parent
        above = nodes if parent[i] < 0 else parent[i]
        x, x_above, r, r_above = predictions[i], predictions[above], rank_x[i], rank_x[above]
        predicted = int(x >= threshold) - int(x_above >= threshold)
        dx, dxx, dr, drr = x - x_above, x * x - x_above * x_above, r - r_above, r * r - r_above**2
        ds = slope[i] - slope[above]
        for e in range(entry_first[i], entry_last[i]):
            c, n = entry_cluster[e], entry_count[e]
            sums[c, PREDICTED] += n * predicted
            sums[c, X] += n * dx
            sums[c, XX] += n * dxx
            sums[c, RX] += n * dr
            sums[c, RXX] += n * drr
            sums[c, SLOPE] += n * ds
    middle = (total + 1) / 2
    silent = total - fired
    rank_silent = (silent + 1) / 2 - middle
    for c in range(CLUSTERS):
        n = cluster_rows[c]
        sums[c, RY] += n * rank_silent
        sums[c, RYY] += n * rank_silent * rank_silent
        sums[c, RXY] = sums[c, RX] * rank_silent
    found = np.zeros(DECILES, np.int64)
    tenth = np.zeros(DECILES, np.int64)
    at = 0
    while at < fired:
        end = at
        while end < fired and activation[order[end]] == activation[order[at]]:
            end += 1
        rank = silent + (at + 1 + end) / 2 - middle
        for place in range(at, end):
            f = order[place]
            c, i, y = cluster[f], node[f], np.float64(activation[f])
            is_predicted = predictions[i] >= threshold
            sums[c, POSITIVE] += 1
            sums[c, HITS] += is_predicted
            sums[c, Y] += y
            sums[c, YY] += y * y
            sums[c, XY] += predictions[i] * y
            sums[c, RY] += rank - rank_silent
            sums[c, RYY] += rank * rank - rank_silent * rank_silent
            sums[c, RXY] += rank_x[i] * (rank - rank_silent)
            sums[c, SLOPE] += bonus[i]
            tenth[place * DECILES // fired] += 1
            found[place * DECILES // fired] += is_predicted
        at = end
    for d in range(DECILES):
        recall[d] = found[d] / tenth[d] if tenth[d] else np.nan
    return auprc


@njit(nogil=True, cache=True)
def _ranked(
    prediction: npt.NDArray[np.float64],
    rows: npt.NDArray[np.int64],
    hits: npt.NDArray[np.int64],
    total: int,
    fired: int,
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64], npt.NDArray[np.float64], float]:
    """Rank predictions over all rows, and derive AUPRC by the weights of rows.

    Returns:
        centred midrank of each node's rows [nodes]; derivative of AUPRC by the weight of a row of
        the node, and how much more it is for a row on which the latent fires [nodes]; AUPRC.
    """
    n = len(prediction)
    order = np.argsort(-prediction)
    rank, slope, bonus = np.zeros(n), np.zeros(n), np.zeros(n)
    level = np.empty(n, np.int64)  # equal predictions share a level
    levels, seen = 0, 0
    level_rows, level_hits = np.zeros(n, np.int64), np.zeros(n, np.int64)
    for at in range(n):
        i = order[at]
        if at and prediction[i] < prediction[order[at - 1]]:
            levels += 1
        level[i] = levels
        level_rows[levels] += rows[i]
        level_hits[levels] += hits[i]
    levels += 1
    above = np.zeros(n, np.float64)
    for k in range(levels):
        above[k] = seen
        seen += level_rows[k]
    for i in range(n):
        k = level[i]
        rank[i] = total - above[k] - (level_rows[k] + 1) / 2 + 1 - (total + 1) / 2
    if fired == 0:
        return rank, slope, bonus, np.nan
    auprc, c = 0.0, 0
    caught = np.zeros(levels, np.int64)
    for k in range(levels):
        c += level_hits[k]
        caught[k] = c
        reached = above[k] + level_rows[k]
        if reached:
            auprc += level_hits[k] / fired * c / reached
    later_slope, later_bonus = 0.0, 0.0
    level_slope, level_bonus = np.zeros(levels), np.zeros(levels)
    for k in range(levels - 1, -1, -1):
        reached = above[k] + level_rows[k]
        if reached:
            later_slope -= level_hits[k] * caught[k] / reached**2 / fired
            later_bonus += level_hits[k] / reached / fired
            level_bonus[k] = later_bonus + caught[k] / reached / fired - auprc / fired
        level_slope[k] = later_slope
    for i in range(n):
        slope[i], bonus[i] = level_slope[level[i]], level_bonus[level[i]]
    return rank, slope, bonus, auprc


def figures_of_sums(sums: Floats, auprc: Floats) -> Floats:
    """Compute the metrics of `METRICS` from sums over rows.

    A program that predicts no firing has precision 0; a correlation with a constant is 0.

    Args:
        sums: float64 [..., latents, 15].
        auprc: AUPRC of each latent over all rows, float64 [latents].

    Returns:
        float64 [..., latents, 6]; NaN for a latent that fires on none of the rows.
    """
    positive, predicted, hits = (sums[..., c] for c in (POSITIVE, PREDICTED, HITS))
    found = np.empty((*sums.shape[:-1], len(METRICS)))
    found[..., 0] = _ratio(hits, predicted)
    found[..., 1] = _ratio(hits, positive)
    found[..., 2] = _ratio(2 * hits, positive + predicted)
    found[..., 3] = np.clip(auprc + sums[..., SLOPE], 0, 1)
    found[..., 4] = _correlation(sums, (X, XX, Y, YY, XY))
    found[..., 5] = _correlation(sums, (RX, RXX, RY, RYY, RXY))
    found[positive == 0] = np.nan
    return found


def _correlation(sums: Floats, columns: tuple[int, ...]) -> Floats:
    """Compute a correlation from sums of x, x², y, y² and x y; 0 if x or y is constant."""
    n = sums[..., N]
    x, xx, y, yy, xy = (sums[..., c] for c in columns)
    vary_x, vary_y = n * xx - x * x, n * yy - y * y
    # rounding leaves a little variance to a constant
    safe = (vary_x > 1e-11 * n * xx) & (vary_y > 1e-11 * n * yy)
    below = np.sqrt(np.where(safe, vary_x * vary_y, 1.0))
    return np.clip(np.where(safe, (n * xy - x * y) / below, 0.0), -1, 1)


def _ratio(above: Floats, below: Floats) -> Floats:
    """Divide; 0 where the divisor is 0."""
    return np.divide(above, below, out=np.zeros(np.shape(below)), where=below > 0)
