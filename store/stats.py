"""Statistics of one site over one shard, and their exact merge over shards.

A row is an *outlier* when its norm exceeds five medians of the norms of its own shard: a worker
can tell so alone, and the answer never changes as a store grows. Ordinary and outlier rows are
summarised apart; together they are all rows.

Moments are kept as (rows, mean, m2), m2 being the sum of squared differences from the mean, and
merged by the formula of Chan, Golub and LeVeque (1979). Everything is float64.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from store.rules import OUTLIER_MEDIANS

FloatArray = npt.NDArray[np.float64]
BLOCK_ROWS = 1024  # a float64 block of this many rows stays in cache
HISTOGRAM_SHIFT = 15  # float32 bits dropped: 256 bins per power of two, 0.4 % wide
OUTLIER_DIMENSION_MEDIANS = 6.0


@dataclass(frozen=True, slots=True)
class Moments:
    """Rows, mean [width] and sum of squared differences from it [width], float64."""

    rows: int
    mean: FloatArray
    m2: FloatArray

    @classmethod
    def empty(cls, width: int) -> Moments:
        return cls(0, np.zeros(width), np.zeros(width))

    @classmethod
    def of(cls, x: npt.NDArray[Any]) -> Moments:
        """Moments of x [rows, width], any float type, two passes over cache-sized blocks."""
        total = cls.empty(x.shape[1])
        for start in range(0, len(x), BLOCK_ROWS):
            block = x[start : start + BLOCK_ROWS].astype(np.float32).astype(np.float64)
            mean = block.mean(axis=0)
            block -= mean
            np.square(block, out=block)
            total = total.merge(cls(len(block), mean, block.sum(axis=0)))
        return total

    def merge(self, other: Moments) -> Moments:
        rows = self.rows + other.rows
        if rows == 0:
            return self
        share = other.rows / rows
        delta = other.mean - self.mean
        return Moments(
            rows,
            self.mean + delta * share,
            self.m2 + other.m2 + delta**2 * (self.rows * share),
        )

    @property
    def variance(self) -> FloatArray:
        """Population variance per dimension [width]; zeros where there are no rows."""
        return self.m2 / max(self.rows, 1)

    def to_json(self) -> dict[str, Any]:
        return {"rows": self.rows, "mean": self.mean.tolist(), "m2": self.m2.tolist()}

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> Moments:
        return cls(content["rows"], np.array(content["mean"]), np.array(content["m2"]))


def summarise(
    x: npt.NDArray[Any], norms: npt.NDArray[np.float32], tokens: npt.NDArray[np.int32]
) -> dict[str, Any]:
    """The statistics of one shard of one site, as stored in its commit record.

    Args:
        x: stored activations [rows, width].
        norms: L2 norms [rows].
        tokens: [contexts, context_length], contexts * context_length = rows.
    """
    median = float(np.median(norms))
    is_outlier = norms > np.float32(OUTLIER_MEDIANS * median)
    outliers = np.flatnonzero(is_outlier)
    bins, counts = np.unique(_histogram_bins(norms), return_counts=True)
    return {
        "norm_median": median,
        "norm_max": float(norms.max()),
        "norm_histogram": dict(zip(map(str, bins.tolist()), counts.tolist(), strict=True)),
        "ordinary": _moments_without(x, outliers).to_json(),
        "outlier": Moments.of(x[outliers]).to_json(),
        "outlier_positions": _count(outliers % tokens.shape[1]),
        "outlier_tokens": _count(tokens.reshape(-1)[outliers]),
    }


def merge(records: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """Statistics of one site over all shards, as stored in sealed.json."""
    ordinary = outlier = None
    histogram: Counter[str] = Counter()
    positions: Counter[str] = Counter()
    tokens: Counter[str] = Counter()
    largest = 0.0
    for record in records:
        o, u = Moments.from_json(record["ordinary"]), Moments.from_json(record["outlier"])
        ordinary = o if ordinary is None else ordinary.merge(o)
        outlier = u if outlier is None else outlier.merge(u)
        histogram.update(record["norm_histogram"])
        positions.update(record["outlier_positions"])
        tokens.update(record["outlier_tokens"])
        largest = max(largest, record["norm_max"])
    if ordinary is None or outlier is None:
        raise ValueError("no shard to merge statistics from")
    return {
        "ordinary": ordinary.to_json(),
        "outlier": outlier.to_json(),
        "outlier_rule": f"norm above {OUTLIER_MEDIANS:g} medians of its shard",
        "outlier_positions": dict(positions.most_common(20)),
        "outlier_tokens": dict(tokens.most_common(20)),
        "outlier_dimensions": outlier_dimensions(ordinary),
        "norm_quantiles": {
            f"{q:g}": histogram_quantile(histogram, q) for q in (0.01, 0.05, 0.5, 0.95, 0.99, 0.999)
        },
        "norm_max": largest,
    }


def outlier_dimensions(moments: Moments) -> list[int]:
    """Dimensions whose root mean square exceeds six medians of all dimensions'."""
    rms = np.sqrt(moments.variance + moments.mean**2)
    return np.flatnonzero(rms > OUTLIER_DIMENSION_MEDIANS * np.median(rms)).tolist()


def histogram_quantile(histogram: Counter[str], q: float) -> float:
    """The norm at quantile q, within 0.4 %: the middle of the bin it falls in."""
    bins = np.array(sorted((int(b), n) for b, n in histogram.items()))  # [bins, (bin, count)]
    cumulative = np.cumsum(bins[:, 1])
    found = bins[np.searchsorted(cumulative, q * cumulative[-1]), 0]
    edges = np.array([found, found + 1], dtype=np.uint32) << np.uint32(HISTOGRAM_SHIFT)
    return float(edges.view(np.float32).astype(np.float64).mean())


def _histogram_bins(norms: npt.NDArray[np.float32]) -> npt.NDArray[np.uint32]:
    # The bits of positive floats sort like the floats: dropping the low ones makes bins that
    # are log-spaced, the same for every shard, and merged by adding counts.
    return np.ascontiguousarray(norms).view(np.uint32) >> np.uint32(HISTOGRAM_SHIFT)


def _moments_without(x: npt.NDArray[Any], left_out: npt.NDArray[np.int64]) -> Moments:
    total = Moments.empty(x.shape[1])
    for start in range(0, len(x), BLOCK_ROWS):
        stop = min(start + BLOCK_ROWS, len(x))
        low, high = np.searchsorted(left_out, [start, stop])
        block = np.delete(x[start:stop], left_out[low:high] - start, axis=0)
        total = total.merge(Moments.of(block))
    return total


def _count(values: npt.NDArray[np.integer[Any]]) -> dict[str, int]:
    keys, counts = np.unique(values, return_counts=True)
    return dict(zip(map(str, keys.tolist()), counts.tolist(), strict=True))
