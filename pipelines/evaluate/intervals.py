"""Intervals of figures over rows: a bootstrap that draws documents.

Rows of one document are alike, so an interval that treated them as independent would be too
narrow. Documents are put into clusters by the hash of their text. A figure is a function of sums
over rows; the sums are kept for each cluster, and whole clusters are drawn with replacement.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from sae_harvest.store.reader import ActivationStore

CLUSTERS = 256
RESAMPLES = 1000
COVERAGE = 0.95
_MIX, _SHIFT = np.uint64(0x9E3779B97F4A7C15), np.uint64(56)  # 2^64 / golden ratio; the top 8 bits

Floats = npt.NDArray[np.float64]
Figure = Callable[[Floats], Floats]  # sums [..., quantities] to values [...]


def clusters_of(text_hash: npt.NDArray[np.uint64]) -> npt.NDArray[np.int64]:
    """Return the cluster of each document, 0 to 255, from the xxh3-64 of its text.

    The high bits of the hash decide whether a document is held out, so they are mixed first.

    >>> import numpy as np
    >>> clusters_of(np.array([1, 2, 3], np.uint64)).tolist()
    [158, 60, 218]
    """
    mixed = (text_hash ^ (text_hash >> np.uint64(32))) * _MIX
    return (mixed >> _SHIFT).astype(np.int64)


def cluster_sums(cluster: npt.NDArray[np.int64], values: npt.NDArray[Any]) -> Floats:
    """Sum rows by cluster, in float64.

    Args:
        cluster: int64 [rows], from 0 to 255.
        values: [rows] or [rows, quantities].

    Returns:
        float64 [256] or [256, quantities].
    """
    sums = np.zeros((CLUSTERS, *values.shape[1:]))
    np.add.at(sums, cluster, values)
    return sums


def row_clusters(store: ActivationStore, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Return the cluster of the document of each row, int64 of the shape of `rows`."""
    shard, inside = np.divmod(rows, store.shard_rows)
    found = np.zeros(rows.shape, np.int64)
    for number in np.unique(shard).tolist():
        here = shard == number
        _, text_hash = store.row_documents(number)
        found[here] = clusters_of(text_hash[inside[here]])
    return found


def ratio(above: Floats, below: Floats) -> Floats:
    """Divide; NaN where the divisor is not above 0."""
    return np.divide(above, below, out=np.full(np.shape(below), np.nan), where=below > 0)


def resampled(
    sums: Floats, figure: Figure, resamples: int = RESAMPLES, seed: int = 0
) -> Floats | None:
    """Return the values of a figure in the resamples of a bootstrap over clusters; see `interval`.

    The draws depend only on `seed` and the clusters that have rows, so that values of figures over
    the same rows belong together.

    Returns:
        float64 [resamples, ...]. None if fewer than two clusters have rows.
    """
    used = sums[np.any(sums.reshape(len(sums), -1) != 0, axis=1)]
    n = len(used)
    if n < 2:
        return None
    totals = np.tensordot(draws(n, resamples, seed), used, axes=1)  # [resamples, ..., quantities]
    return np.asarray(figure(totals), np.float64)


@lru_cache(maxsize=4)
def draws(n: int, resamples: int, seed: int) -> Floats:
    """Return how often each of n clusters is drawn, float64 [resamples, n]."""
    drawn = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), resamples)
    return drawn.astype(np.float64)


def percentiles(values: Floats) -> tuple[Floats, Floats]:
    """Return the 2.5 and 97.5 percentiles of values [resamples, ...]; NaN without any value."""
    tail = (1 - COVERAGE) / 2
    finite = np.isfinite(values)
    defined, whole = finite.any(axis=0), finite.all(axis=0)
    limits = np.full((2, *values.shape[1:]), np.nan)
    limits[:, whole] = np.quantile(values[:, whole], [tail, 1 - tail], axis=0)
    some = defined & ~whole
    if some.any():
        limits[:, some] = np.nanquantile(values[:, some], [tail, 1 - tail], axis=0)
    return limits[0], limits[1]


def interval(
    sums: Floats, figure: Figure, resamples: int = RESAMPLES, seed: int = 0
) -> tuple[Floats, Floats] | None:
    """Return the 95 % interval of a figure, by a bootstrap over clusters.

    Args:
        sums: float64 [clusters, ..., quantities], sums over the rows of each cluster. A cluster
            without rows has only zeros, and is left out.
        figure: takes sums [resamples, ..., quantities] over all drawn clusters, and returns values
            [resamples, ...]; NaN where the value is not defined.
        resamples: number of draws.
        seed: seed of the draws.

    Returns:
        Lower and upper limit, each [...]: the 2.5 and 97.5 percentiles of the values of the
        resamples; NaN where no resample has a value. None if fewer than two clusters have rows.
    """
    values = resampled(sums, figure, resamples, seed)
    return None if values is None else percentiles(values)
