"""Pooling of firings over documents, the survey of all latents, and its independence of order."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from sae_harvest.pipelines.evaluate.probing import pooling as pooling_module
from sae_harvest.pipelines.evaluate.probing.examples import DOCUMENTS, ROWS, Examples
from sae_harvest.pipelines.evaluate.probing.newton import LOSS, fit_one
from sae_harvest.pipelines.evaluate.probing.pooling import (
    POOLINGS,
    DenseColumns,
    Pooling,
    StoredFirings,
    pooled_channels,
    row_channels,
)
from sae_harvest.pipelines.evaluate.probing.survey import (
    Labelling,
    fit_best,
    largest_differences,
    values_of,
)
from sae_harvest.store.reader import ActivationStore
from tests.feature_cases import Case, encode_blocks, made_case
from tests.synthetic import SITE, make_store


def examples_of(case: Case, unit: str, seed: int = 0) -> Examples:
    """Rows of the case or its documents, with three tasks of random classes."""
    rng = np.random.default_rng(seed)
    rows = np.arange(case.n_rows)
    used = case.read & (case.documents >= 0)
    if unit == ROWS:
        n, of_row, n_rows, last = case.n_rows, np.where(used, rows, -1), np.ones(case.n_rows), rows
    else:
        numbers, of = np.unique(np.where(used, case.documents, -1), return_inverse=True)
        of_row, n = of - 1, len(numbers) - 1
        assert numbers[0] == -1
        n_rows = np.bincount(of_row[used], minlength=n)
        last = np.array([np.flatnonzero(of_row == e).max() for e in range(n)])
    codes = rng.integers(0, 3, (n, 3)).astype(np.uint8)
    if unit == ROWS:
        codes[~used] = 2
    test, cluster = rng.random(n) < 0.5, rng.integers(0, 256, n)
    return Examples(
        unit, ("a", "b", "c"), codes, test, cluster, of_row.astype(np.int32), n_rows, last
    )


def dense_values(case: Case, examples: Examples, pooling: Pooling) -> np.ndarray:
    """The pooled values [examples, latents], from the dense matrix."""
    dense = case.dense
    if examples.unit == ROWS:
        return dense
    pooled = np.zeros((len(examples), case.n_latents))
    for e in range(len(examples)):
        rows = np.flatnonzero(examples.of_row == e)
        how = {"mean": dense[rows].mean(0), "maximum": dense[rows].max(0), "last": dense[rows[-1]]}
        pooled[e] = how[pooling]
    return pooled


def stored(case: Case, folder: Path, n_contexts: int = 4, batch_rows: int = 50) -> StoredFirings:
    blocks = encode_blocks(case, folder, n_contexts, batch_rows=batch_rows)
    return StoredFirings(blocks, (case.dense > 0).sum(0))


@pytest.fixture(scope="module")
def case() -> Case:
    return made_case()


@pytest.mark.parametrize("unit", [ROWS, DOCUMENTS])
@pytest.mark.parametrize("pooling", POOLINGS)
def test_values_are_those_of_the_dense_matrix(
    case: Case, tmp_path: Path, unit: str, pooling: Pooling, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pooling_module, "PAIRS", 300)  # a few latents at a time
    examples, firings = examples_of(case, unit), stored(case, tmp_path)
    assert len(list(firings.pairs(examples, pooling))) > 2
    found = values_of(firings, examples, pooling, np.arange(case.n_latents))
    expected = dense_values(case, examples, pooling)
    np.testing.assert_allclose(np.stack([*found.values()], axis=1), expected, rtol=1e-6)


@pytest.mark.parametrize("unit", [ROWS, DOCUMENTS])
def test_the_best_latents_are_those_of_fits_one_by_one(
    case: Case, tmp_path: Path, unit: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pooling_module, "PAIRS", 300)
    examples, firings = examples_of(case, unit), stored(case, tmp_path)
    labelling = Labelling.unweighted(examples.codes)
    [best] = fit_best(firings, examples, "mean", [labelling], n_best=4)
    z = dense_values(case, examples, "mean").astype(np.float32)
    for t in range(3):
        codes = examples.codes[:, t]
        inside = codes != 2
        losses = []
        for latent in range(case.n_latents):
            column, y = z[inside, latent].astype(float), codes[inside].astype(float)
            zeros = np.array([(y[column == 0] == c).sum() for c in (0, 1)])
            fit = fit_one(column[column != 0], y[column != 0], zeros, np.ones(2))
            losses.append(fit[LOSS])
        order = np.argsort(losses, kind="stable")[:4]
        assert best.latent[t].tolist() == order.tolist()
        np.testing.assert_allclose(best.fit[t, :, LOSS], np.array(losses)[order], atol=1e-9)


def test_results_do_not_depend_on_blocks_or_batches(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    examples = examples_of(case, DOCUMENTS)
    labelling = Labelling.unweighted(examples.codes)
    found = []
    for number, (n_contexts, batch_rows, at_once) in enumerate([(4, 50, 300), (10, 7, 1 << 20)]):
        monkeypatch.setattr(pooling_module, "PAIRS", at_once)
        firings = stored(case, tmp_path / f"{number}", n_contexts, batch_rows)
        found.append(fit_best(firings, examples, "mean", [labelling], 13)[0])
    np.testing.assert_array_equal(found[0].latent, found[1].latent)
    np.testing.assert_array_equal(found[0].fit, found[1].fit)


def test_the_largest_differences_are_those_of_class_means_over_their_spread(
    case: Case, tmp_path: Path
) -> None:
    examples, firings = examples_of(case, ROWS), stored(case, tmp_path)
    codes = examples.part(test=False)
    found = largest_differences(firings, examples, "mean", codes, 3)
    for t in range(3):
        of = [case.dense[codes[:, t] == c] for c in (0, 1)]
        spread = np.sqrt((of[0].var(0) + of[1].var(0)) / 2)
        ratio = np.abs(of[1].mean(0) - of[0].mean(0)) / np.where(spread > 0, spread, 1)
        expected = np.argsort(-ratio, kind="stable")[:3]
        assert found[t].tolist() == expected.tolist()


def test_a_weighted_sample_has_the_shares_of_the_population() -> None:
    population = np.array([0] * 90 + [1] * 10, np.uint8)[:, None]
    sample = np.full((100, 1), 2, np.uint8)
    sample[:9], sample[90:] = 0, 1
    labelling = Labelling.weighted(sample, population)
    assert labelling.counts.tolist() == [[9, 10]]
    assert labelling.class_weights.tolist() == [[10, 1]]


def test_shuffled_labels_keep_their_examples_and_counts() -> None:
    codes = np.random.default_rng(0).integers(0, 3, (200, 2)).astype(np.uint8)
    labelling = Labelling.unweighted(codes)
    shuffled = labelling.shuffled(3)
    np.testing.assert_array_equal(shuffled.codes == 2, codes == 2)
    np.testing.assert_array_equal(shuffled.counts, labelling.counts)
    assert (shuffled.codes != codes).any()
    np.testing.assert_array_equal(shuffled.codes, labelling.shuffled(3).codes)


def test_channels_are_pooled_like_latents(tmp_path: Path) -> None:
    make_store(tmp_path / "s")
    store = ActivationStore.open(tmp_path / "s")
    n = 60 * 16
    rng = np.random.default_rng(0)
    of_row = rng.permutation(np.repeat(np.arange(-1, 47), 20)).astype(np.int32)
    assert len(of_row) == n
    x = store.read(SITE, 0, n).astype(np.float64)
    last = np.array([np.flatnonzero(of_row == e)[3] for e in range(47)])
    none = np.zeros((47, 0), np.uint8)
    examples = Examples(
        DOCUMENTS, (), none, none[:, 0:0].any(1), np.zeros(47, np.int64), of_row, np.full(47, 20),
        last,
    )  # fmt: skip
    of = [x[of_row == e] for e in range(47)]
    for pooling, expected in (
        ("mean", [rows.mean(0) for rows in of]),
        ("maximum", [rows.max(0) for rows in of]),
        ("last", x[last]),
    ):
        found = pooled_channels(store, SITE, examples, pooling)  # type: ignore[arg-type]
        np.testing.assert_allclose(found, expected, rtol=1e-5)
    rows = np.array([0, 3, 127, 128, 900, store.n_rows - 1])
    every = store.read(SITE, 0, store.n_rows)
    np.testing.assert_array_equal(row_channels(store, SITE, rows), every[rows])


def test_columns_of_a_matrix_stand_for_latents(monkeypatch: pytest.MonkeyPatch, case: Case) -> None:
    monkeypatch.setattr(pooling_module, "PAIRS", 3 * case.n_rows)
    examples = examples_of(case, ROWS)
    x = np.random.default_rng(0).standard_normal((case.n_rows, 10)).astype(np.float32)
    found = values_of(DenseColumns(x), examples, "mean", np.array([0, 3, 9]))
    for column, z in found.items():
        np.testing.assert_array_equal(z, x[:, column])
