"""Statistics merge exactly and describe what is stored."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from sae_harvest.store.reader import ActivationStore
from sae_harvest.store.statistics.stats import (
    Merge,
    Moments,
    histogram_quantile,
    moments_of_groups,
    outlier_dimensions,
    quantization_fvu,
    squared_error,
    summarise,
)
from tests.synthetic import SITE, make_store


def two_passes(x: npt.NDArray[Any]) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """Mean and sum of squared differences from it, by their definition, in extended precision."""
    exact = x.astype(np.longdouble)
    mean = exact.mean(axis=0)
    return mean, np.square(exact - mean).sum(axis=0)


def merge(records: list[dict[str, Any]]) -> dict[str, Any]:
    merged = Merge()
    for record in records:
        merged.add(record)
    return merged.to_json()


def check(moments: Moments, x: npt.NDArray[Any]) -> None:
    mean, m2 = two_passes(x)
    assert moments.rows == len(x)
    spread = np.sqrt(m2 / len(x)).astype(np.float64) + np.abs(mean).astype(np.float64)
    assert (np.abs(moments.mean - mean) <= 1e-12 * spread).all()
    np.testing.assert_allclose(moments.m2, m2.astype(np.float64), rtol=1e-12)


def every_float16() -> npt.NDArray[np.float16]:
    """All finite numbers of the type, ±0 and subnormals among them."""
    every = np.arange(2**16, dtype=np.uint16).view(np.float16)
    return every[np.isfinite(every)]


def test_every_float16_is_read_exactly() -> None:
    # Each alone in its column: its mean is itself and nothing is left to round.
    every = every_float16()[np.newaxis]
    one = Moments.of(every)
    assert np.array_equal(one.mean, every[0].astype(np.float64))
    assert not one.m2.any()


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
@pytest.mark.parametrize("rows", [1, 255, 256, 257, 4000])
def test_moments_equal_two_passes_in_extended_precision(dtype: type, rows: int) -> None:
    random = np.random.default_rng(rows)
    x = random.standard_normal((rows, 8)) * [1, 1e-7, 3e-6, 1e3, 1, 0, 1, 1e4]
    x += [0, 0, 0, 0, 1000, -3, 0, 0]
    x[:, 6] = random.choice(every_float16(), rows)  # of every size
    check(Moments.of(x.astype(dtype)), x.astype(dtype))


def test_moments_hold_far_from_zero_and_after_a_jump() -> None:
    # Differences far smaller than the mean, and a mean that is elsewhere later on.
    x = np.random.default_rng(3).standard_normal((3000, 3)).astype(np.float32)
    x[:, 0] += 1e5
    x[1500:, 1] += 1e5
    x[::256, 2] = 1e5  # the first row of each block of 256
    check(Moments.of(x), x)


@pytest.mark.parametrize("share", [0, 0.01, 0.5, 1])
def test_groups_are_summed_apart(share: float) -> None:
    random = np.random.default_rng(4)
    is_apart = random.random(3000) < share
    x = random.standard_normal((3000, 5)).astype(np.float16)
    x[is_apart] *= 300
    for moments, rows in zip(moments_of_groups(x, is_apart), (~is_apart, is_apart), strict=True):
        if rows.any():
            check(moments, x[rows])
        else:
            assert moments.rows == 0
            assert not moments.mean.any()
            assert not moments.m2.any()


def test_constant_columns_have_no_variance() -> None:
    constants = np.array([0, -0.0, 1, -65504, 2**-24, 0.1], np.float16)
    moments = Moments.of(np.tile(constants, (1000, 1)))
    assert np.array_equal(moments.mean, constants.astype(np.float64))
    assert not moments.m2.any()


def test_moments_do_not_depend_on_memory_layout() -> None:
    x = np.random.default_rng(5).standard_normal((700, 12)).astype(np.float16)
    expected = Moments.of(x).to_json()
    frozen = np.frombuffer(x.tobytes(), np.float16).reshape(x.shape)  # may not be written to
    assert Moments.of(frozen).to_json() == expected
    assert Moments.of(np.asfortranarray(x)).to_json() == expected
    assert Moments.of(np.repeat(x, 2, axis=0)[::2]).to_json() == expected
    assert Moments.of(x.astype(np.float32)).to_json() == expected


def test_numbers_that_are_not_finite_show() -> None:
    x = np.ones((600, 3), np.float16)
    x[300, 0], x[301, 1] = np.nan, np.inf
    moments = Moments.of(x)
    assert np.isfinite(moments.mean).tolist() == [False, False, True]
    assert np.isnan(moments.m2[:2]).all()


def test_squared_errors_are_summed_by_dimension() -> None:
    x = np.array([[1, 2], [3, 4]], np.float16)
    stored = np.array([[1.5, 2], [3.25, 2]], np.float32)
    assert squared_error(x, stored) == [0.3125, 4]
    assert squared_error(stored, stored) == [0, 0]


def test_quantization_errors_are_merged_and_compared_with_the_variance() -> None:
    x = np.array([[3, 5], [4, 5], [5, 5], [4, 5]], np.float16)  # m2 = 2, 0
    norms = np.linalg.norm(x.astype(np.float32), axis=1)
    s = summarise(x, norms, np.zeros((2, 2), np.int32))
    assert "quantization_error" not in merge([s, s])
    both = merge([s | {"quantization_error": [0.5, 0]}, s | {"quantization_error": [0.1, 0]}])
    assert both["quantization_error"] == [0.6, 0]
    ordinary = Moments.from_json(both["ordinary"])
    lost = quantization_fvu(both["quantization_error"], ordinary)
    assert lost.tolist() == pytest.approx([0.15, 0])
    assert quantization_fvu([0, 1], ordinary).tolist() == [0, np.inf]


def test_numba_is_imported_only_to_compute() -> None:
    names = "sae_harvest.store.statistics.stats, sae_harvest.store.statistics.quantize"
    code = f"import sys, {names}; sys.exit('numba' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


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
