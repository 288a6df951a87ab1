"""Statistics of one site over one shard, and their exact merge over shards.

A row is an *outlier* if its norm exceeds five medians of the norms of its own shard. So one worker
can decide it alone, and the answer does not change when a store grows. Ordinary and outlier rows
are summarised separately; together they are all rows.

Moments are kept as (rows, mean, m2), m2 being the sum of squared differences from the mean, and
merged by the formula of Chan, Golub and LeVeque (1979). Sums are float64, in an order that depends
only on the rows.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from sae_harvest.store.rules import OUTLIER_MEDIANS

FloatArray = npt.NDArray[np.float64]
HISTOGRAM_SHIFT = 15  # float32 bits dropped: 256 bins per power of two, 0.4 % wide
HISTOGRAM_BINS = (0x7F80_0000 >> HISTOGRAM_SHIFT) - 1  # bins of finite norms
OUTLIER_DIMENSION_MEDIANS = 6.0


@dataclass(frozen=True, slots=True)
class Moments:
    """Count, mean and squared deviations of some rows."""

    rows: int
    """Number of rows."""
    mean: FloatArray
    """Mean of the rows, float64 [width]."""
    m2: FloatArray
    """Sum of squared differences from the mean, float64 [width]."""

    @classmethod
    def empty(cls, width: int) -> Moments:
        return cls(0, np.zeros(width), np.zeros(width))

    @classmethod
    def of(cls, x: npt.NDArray[Any]) -> Moments:
        """Return the moments of x [rows, width]; types other than float16 are read as float32."""
        return moments_of_groups(x, np.zeros(len(x), np.bool_))[0]

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
        """Population variance per dimension, float64 [width]; zeros if there are no rows."""
        return self.m2 / max(self.rows, 1)

    def to_json(self) -> dict[str, Any]:
        return {"rows": self.rows, "mean": self.mean.tolist(), "m2": self.m2.tolist()}

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> Moments:
        mean, m2 = (np.array(content[name], np.float64) for name in ("mean", "m2"))
        return cls(content["rows"], mean, m2)


def bits_of(x: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Return the bits of x for compiled loops: uint16 of float16, else uint32 of float32."""
    if x.dtype == np.float16:
        return np.ascontiguousarray(x).view(np.uint16)
    return np.ascontiguousarray(x, np.float32).view(np.uint32)


def moments_of_groups(
    x: npt.NDArray[Any], is_apart: npt.NDArray[np.bool_]
) -> tuple[Moments, Moments]:
    """Return the moments of the rows of x [rows, width] not apart, and of the rows apart.

    Args:
        x: any float type; types other than float16 are read as float32.
        is_apart: bool [rows].
    """
    from sae_harvest.store.statistics.moments_jit import (
        add_moments,  # numba takes a second to import
    )

    rows = np.zeros(2, np.int64)
    mean, m2 = np.zeros((2, x.shape[1])), np.zeros((2, x.shape[1]))
    add_moments(bits_of(x), is_apart, rows, mean, m2)
    return Moments(int(rows[0]), mean[0], m2[0]), Moments(int(rows[1]), mean[1], m2[1])


def warm_up() -> None:
    """Load the compiled loops now: this takes a second, which would delay a worker's model."""
    for dtype in (np.float16, np.float32):
        moments_of_groups(np.zeros((1, 1), dtype), np.zeros(1, np.bool_))


def outlier_rows(norms: npt.NDArray[np.float32]) -> npt.NDArray[np.bool_]:
    """Return the mask of a shard's outlier rows, bool [rows], from the norms of all rows [rows]."""
    return norms > np.float32(OUTLIER_MEDIANS * float(np.median(norms)))


def squared_error(x: npt.NDArray[Any], stored: npt.NDArray[Any]) -> list[float]:
    """Sum over rows of (x - stored)^2 in each dimension, [width]; both are [rows, width].

    For int8 stores. Outlier rows add nothing, since they are stored exactly.
    """
    from sae_harvest.store.statistics.moments_jit import add_squared_error

    error = np.zeros(x.shape[1])
    add_squared_error(bits_of(x), bits_of(stored), error)
    return error.tolist()


def quantization_fvu(error: Sequence[float], ordinary: Moments) -> FloatArray:
    """Return the share of the ordinary rows' variance that an int8 store loses, [width].

    Args:
        error: "quantization_error" of a site's statistics, [width].
        ordinary: moments of its ordinary rows.
    """
    squared = np.array(error)
    lost = np.where(squared > 0, np.inf, 0.0)  # a constant dimension that is exact loses nothing
    return np.divide(squared, ordinary.m2, out=lost, where=ordinary.m2 > 0)


def summarise(
    x: npt.NDArray[Any], norms: npt.NDArray[np.float32], tokens: npt.NDArray[np.int32]
) -> dict[str, Any]:
    """Return the statistics of one site in one shard, as stored in the commit record.

    For an int8 store the writer adds "quantization_error", its `squared_error`.

    Args:
        x: stored activations [rows, width].
        norms: L2 norms [rows].
        tokens: [contexts, context_length], contexts * context_length = rows.
    """
    is_outlier = outlier_rows(norms)
    outliers = np.flatnonzero(is_outlier)
    ordinary, outlier = moments_of_groups(x, is_outlier)
    bins, counts = np.unique(_histogram_bins(norms), return_counts=True)
    return {
        "norm_median": float(np.median(norms)),
        "norm_max": float(norms.max()),
        "norm_histogram": dict(zip(map(str, bins.tolist()), counts.tolist(), strict=True)),
        "ordinary": ordinary.to_json(),
        "outlier": outlier.to_json(),
        "outlier_positions": _count(outliers % tokens.shape[1]),
        "outlier_tokens": _count(tokens.reshape(-1)[outliers]),
    }


class Merge:
    """The statistics of one site, merged over the shards added so far."""

    def __init__(self) -> None:
        self._groups: dict[str, Moments] = {}
        self._counts: dict[str, Counter[str]] = {
            name: Counter() for name in ("norm_histogram", "outlier_positions", "outlier_tokens")
        }
        self._largest = 0.0
        self._error: FloatArray | None = None

    def add(self, record: dict[str, Any]) -> None:
        """Add the statistics of the next shard, from its commit record."""
        for group in ("ordinary", "outlier"):
            moments = Moments.from_json(record[group])
            before = self._groups.get(group)
            self._groups[group] = moments if before is None else before.merge(moments)
        for name, counter in self._counts.items():
            counter.update(record[name])
        self._largest = max(self._largest, record["norm_max"])
        if "quantization_error" in record:
            error = np.array(record["quantization_error"], np.float64)
            self._error = error if self._error is None else self._error + error

    def to_json(self) -> dict[str, Any]:
        """Return the merged statistics, as stored with a seal."""
        ordinary, outlier = self._groups["ordinary"], self._groups["outlier"]
        histogram = self._counts["norm_histogram"]
        quantiles = (0.01, 0.05, 0.5, 0.95, 0.99, 0.999)
        merged = {
            "ordinary": ordinary.to_json(),
            "outlier": outlier.to_json(),
            "outlier_rule": f"norm above {OUTLIER_MEDIANS:g} medians of its shard",
            "outlier_positions": dict(self._counts["outlier_positions"].most_common(20)),
            "outlier_tokens": dict(self._counts["outlier_tokens"].most_common(20)),
            "outlier_dimensions": outlier_dimensions(ordinary),
            "norm_quantiles": {f"{q:g}": histogram_quantile(histogram, q) for q in quantiles},
            "norm_max": self._largest,
        }
        if self._error is not None:
            merged["quantization_error"] = self._error.tolist()
        return merged


def outlier_dimensions(moments: Moments) -> list[int]:
    """Return the dimensions whose root mean square exceeds six medians over dimensions."""
    rms = np.sqrt(moments.variance + moments.mean**2)
    return np.flatnonzero(rms > OUTLIER_DIMENSION_MEDIANS * np.median(rms)).tolist()


def histogram_quantile(histogram: Counter[str], q: float) -> float:
    """Return the norm at quantile q, within 0.4 %: the middle of its bin."""
    bins = np.array(sorted((int(b), n) for b, n in histogram.items()))  # [bins, (bin, count)]
    cumulative = np.cumsum(bins[:, 1])
    found = bins[np.searchsorted(cumulative, q * cumulative[-1]), 0]
    edges = np.array([found, found + 1], dtype=np.uint32) << np.uint32(HISTOGRAM_SHIFT)
    return float(edges.view(np.float32).astype(np.float64).mean())


def _histogram_bins(norms: npt.NDArray[np.float32]) -> npt.NDArray[np.uint32]:
    # The bits of positive floats sort like the floats. Dropping the low bits gives log-spaced
    # bins that are the same for every shard and are merged by adding counts.
    return np.ascontiguousarray(norms).view(np.uint32) >> np.uint32(HISTOGRAM_SHIFT)


def _count(values: npt.NDArray[np.integer[Any]]) -> dict[str, int]:
    keys, counts = np.unique(values, return_counts=True)
    return dict(zip(map(str, keys.tolist()), counts.tolist(), strict=True))
