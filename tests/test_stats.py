"""Statistics merge exactly and describe what is stored."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from store.reader import ActivationStore
from store.stats import Moments, histogram_quantile, merge, outlier_dimensions, summarise
from tests.synthetic import SITE, make_store


def test_merged_moments_equal_those_of_all_rows() -> None:
    x = np.random.default_rng(0).standard_normal((5000, 6)).astype(np.float32) * 10 + 1000
    parts = [Moments.of(part) for part in np.split(x, [1, 17, 1700, 4999])]
    total = Moments.empty(6)
    for part in parts:
        total = total.merge(part)
    exact = x.astype(np.float64)
    assert total.rows == 5000
    np.testing.assert_allclose(total.mean, exact.mean(axis=0), rtol=1e-13)
    np.testing.assert_allclose(total.variance, exact.var(axis=0), rtol=1e-10)


def test_a_hand_worked_shard() -> None:
    # Norms 3 4 5 4 and a sink of 100: the median is 4, the limit 20, so row 4 alone is out.
    x = np.array([[3, 0], [0, 4], [3, 4], [4, 0], [100, 0], [0, 4]], np.float16)
    norms = np.linalg.norm(x.astype(np.float32), axis=1)
    tokens = np.array([[7, 8, 9], [7, 5, 9]], np.int32)
    s = summarise(x, norms, tokens)
    assert s["norm_median"] == 4
    assert s["ordinary"]["rows"] == 5
    assert s["ordinary"]["mean"] == pytest.approx([2, 2.4])
    assert s["outlier"]["mean"] == [100, 0]
    assert s["outlier_positions"] == {"1": 1}
    assert s["outlier_tokens"] == {"5": 1}
    both = merge([s, s])
    assert both["ordinary"]["rows"] == 10
    assert both["ordinary"]["mean"] == pytest.approx([2, 2.4])
    assert both["outlier_tokens"] == {"5": 2}
    assert both["norm_max"] == 100


def test_quantiles_are_within_half_a_per_cent() -> None:
    norms = np.random.default_rng(1).lognormal(3, 1, 100_000).astype(np.float32)
    bins, counts = np.unique(norms.view(np.uint32) >> 15, return_counts=True)
    histogram = Counter(dict(zip(map(str, bins.tolist()), counts.tolist(), strict=True)))
    for q in (0.01, 0.5, 0.99):
        assert histogram_quantile(histogram, q) == pytest.approx(np.quantile(norms, q), rel=5e-3)


def test_outlier_dimensions_are_found() -> None:
    x = np.random.default_rng(2).standard_normal((1000, 50))
    x[:, 7] *= 30
    x[:, 9] += 40
    assert outlier_dimensions(Moments.of(x)) == [7, 9]


def test_a_store_merges_its_shards(tmp_path: Path) -> None:
    make_store(tmp_path / "s")
    store = ActivationStore.open(tmp_path / "s")
    exact = store.read(SITE, 0, store.n_rows).astype(np.float64)
    every = store.statistics(SITE)["all"]
    assert every.rows == store.n_rows
    np.testing.assert_allclose(every.mean, exact.mean(axis=0), rtol=1e-10)
    np.testing.assert_allclose(every.variance, exact.var(axis=0), rtol=1e-10)
