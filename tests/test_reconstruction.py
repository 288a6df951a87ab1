"""Every definition of reconstruction error, against values worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sae_harvest.pipelines.evaluate.figures import figures_table
from sae_harvest.pipelines.evaluate.intervals import clusters_of, interval
from sae_harvest.pipelines.evaluate.reconstruction import (
    HeldoutRows,
    Reconstruction,
    paper_normalised,
    reconstruction,
)
from sae_harvest.store.reader import ActivationStore
from sae_harvest.store.rules import RowRule
from sae_harvest.train.config import SAEConfig
from sae_harvest.train.evaluate import evaluate
from sae_harvest.train.sae.sae import SAE
from tests.synthetic import OTHER, SITE, make_store, make_two_sites

RULE = RowRule(heldout_fraction=0.4)
D = 8


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> ActivationStore:
    root = tmp_path_factory.mktemp("reconstruction") / "s"
    make_store(root)
    return ActivationStore.open(root)


@pytest.fixture(scope="module")
def held_out(store: ActivationStore) -> HeldoutRows:
    return HeldoutRows.of(store, config(), RULE, 10_000)


def config(**fields) -> SAEConfig:
    known = {"d_in": D, "n_latents": 2 * D, "k": D, "site": SITE, "rule": RULE}
    return SAEConfig.model_validate(known | fields)


def perfect(k: int = D) -> SAE:
    rows = torch.cat([torch.eye(D), -torch.eye(D)])
    return SAE(config(k=k), rows.clone(), rows, torch.zeros(2 * D), torch.zeros(D))


def constant(vector: torch.Tensor) -> SAE:
    sae = perfect()
    sae.b_enc[:] = -1e6
    sae.b_dec = vector
    return sae


def rows_of(store: ActivationStore, held_out: HeldoutRows, part: str) -> np.ndarray:
    x = store.read(SITE, 0, store.n_rows)[held_out.rows].astype(np.float64)
    return x[held_out.part(part)]


def values(found: Reconstruction, part: str = "without outliers") -> dict[str, float]:
    return {figure.metric: figure.value for figure in found.figures("SAE", part)}


def test_the_mean_predictor_has_fvu_1_and_a_perfect_dictionary_0(store, held_out):
    mean = torch.from_numpy(rows_of(store, held_out, "without outliers").mean(0)).float()
    saes = {"mean": constant(mean), "perfect": perfect()}
    found = reconstruction(saes, store, held_out)
    of_mean = values(found["mean", "without outliers"])
    assert of_mean["fvu"] == pytest.approx(1, abs=1e-9)
    assert of_mean["explained_variance_legacy"] == pytest.approx(0, abs=1e-6)
    assert of_mean["l0"] == 0
    assert of_mean["dead_share"] == 1
    of_perfect = values(found["perfect", "without outliers"])
    assert of_perfect["fvu"] == pytest.approx(0, abs=1e-12)
    assert of_perfect["paper_nmse"] == pytest.approx(0, abs=1e-12)
    assert of_perfect["explained_variance_legacy"] == pytest.approx(1, abs=1e-9)
    assert of_perfect["row_nmse"] == pytest.approx(0, abs=1e-12)
    assert of_perfect["cosine"] == pytest.approx(1, abs=1e-9)
    assert of_perfect["l0"] == D
    assert of_perfect["dead_share"] == 0


@pytest.mark.parametrize("part", ["without outliers", "with outliers"])
def test_figures_are_those_of_the_formulas_in_float64(store, held_out, part):
    """The 3 largest of 8 numbers of each row are kept: everything follows from the rows."""
    found = reconstruction({"SAE": perfect(3)}, store, held_out)["SAE", part]
    x = rows_of(store, held_out, part)
    both = np.concatenate([x, -x], axis=1)  # what latents +e_i and -e_i see
    kept = np.zeros(both.shape, bool)  # of two equal values, the lower latent's is kept
    np.put_along_axis(kept, np.argsort(-both, axis=1, kind="stable")[:, :3], True, axis=1)
    kept = kept[:, :D] | kept[:, D:]
    x_hat = np.where(kept, x, 0)
    error, deviation = np.square(x - x_hat), np.square(x - x.mean(0))
    centred = x - x.mean(1, keepdims=True)
    norm = np.linalg.norm(centred, axis=1, keepdims=True)
    own, own_hat = centred / norm, (x_hat - x.mean(1, keepdims=True)) / norm
    expected = {
        "fvu": error.sum() / deviation.sum(),
        "mse": error.sum(1).mean(),
        "explained_variance_legacy": np.mean(1 - error.sum(1) / deviation.sum(1)),
        "row_nmse": np.mean(error.sum(1) / np.square(x).sum(1)),
        "paper_nmse": np.square(own - own_hat).sum() / np.square(own - own.mean(0)).sum(),
        "cosine": np.mean(
            (x * x_hat).sum(1) / np.linalg.norm(x, axis=1) / np.linalg.norm(x_hat, axis=1)
        ),
        "l0": 3,
        "l1": np.abs(x_hat).sum(1).mean(),
        "norm": np.linalg.norm(x, axis=1).mean(),
        "norm_reconstructed": np.linalg.norm(x_hat, axis=1).mean(),
        "norm_ratio": np.mean(np.linalg.norm(x_hat, axis=1) / np.linalg.norm(x, axis=1)),
        # the factor by which reconstructions are too long, in the sense of least squares
        "reconstruction_bias": 1 / np.linalg.lstsq(x_hat.reshape(-1, 1), x.ravel())[0][0],
    }
    got = values(found, part)
    assert {name: got[name] for name in expected} == pytest.approx(expected, rel=1e-6)
    position = held_out.position[held_out.part(part)]
    for place in (0, 5):
        here = position == place
        if here.any():
            share = error[here].sum() / deviation[here].sum()
            assert found.per_position[place] == pytest.approx(share, rel=1e-6)
        else:
            assert np.isnan(found.per_position[place])
    assert found.per_dimension == pytest.approx(error.sum(0) / deviation.sum(0), rel=1e-6)
    assert found.l0.tolist() == [0, 0, 0, len(x)]
    fires = np.concatenate([(kept & (x > 0)).sum(0), (kept & (x < 0)).sum(0)])
    assert found.n_fire.tolist() == fires.tolist()


def test_training_and_this_pass_agree(store, held_out):
    sae = perfect(3)
    short = evaluate(sae, store, RULE, 10_000)
    found = reconstruction({"SAE": sae}, store, held_out)
    for part, key in (
        ("without outliers", "without_outliers"),
        ("with outliers", "with_outliers"),
    ):
        got = values(found["SAE", part], part)
        assert got["fvu"] == pytest.approx(short[key]["fvu"], rel=1e-9)
        assert got["l0"] == short[key]["l0"]
        assert got["dead_share"] == short[key]["dead_share"]
        assert found["SAE", part].rows == short[key]["rows"]


def test_the_order_and_number_of_pieces_changes_nothing():
    rng = np.random.default_rng(3)
    x = rng.standard_normal((90, D)).astype(np.float32)
    x_hat = (x + rng.standard_normal((90, D)) * 0.3).astype(np.float32)
    indices = np.tile(np.arange(4, dtype=np.int32), (90, 1))
    fires = np.maximum(rng.standard_normal((90, 4)), 0).astype(np.float32)
    cluster, position = rng.integers(0, 30, 90), rng.integers(0, 16, 90)
    arrays = x, x_hat, indices, fires, cluster, position
    means = x.astype(np.float64).mean(0), paper_normalised(x.astype(np.float64))[0].mean(0)
    whole = Reconstruction(means, 16, 2 * D)
    whole.update(*arrays)
    order = rng.permutation(90)
    pieces = Reconstruction(means, 16, 2 * D)
    for first in range(0, 90, 7):
        pieces.update(*(array[order[first : first + 7]] for array in arrays))
    for one, other in zip(whole.figures("a", "b"), pieces.figures("a", "b"), strict=True):
        assert one.metric == other.metric
        assert other.value == pytest.approx(one.value, rel=1e-9)
        if one.low is not None:
            assert other.low == pytest.approx(one.low, rel=1e-9)
    assert pieces.per_position == pytest.approx(whole.per_position, nan_ok=True)


def test_a_transcoder_is_judged_at_its_target_on_rows_that_its_rule_admits_at_both_sites(tmp_path):
    make_two_sites(tmp_path / "s", 6)
    store = ActivationStore.open(tmp_path / "s")
    width = store.width(OTHER)
    vector = torch.randn(width, generator=torch.Generator().manual_seed(1))
    fields = {"target_site": OTHER, "d_out": width, "k": 1}
    config_ = config(**fields)
    sae = SAE(
        config_,
        torch.zeros(2 * D, D),
        torch.zeros(2 * D, width),
        torch.full((2 * D,), -1e6),
        vector,
        b_in=torch.zeros(D),
    )
    held_out = HeldoutRows.of(store, config_, RULE, 10_000)
    found = reconstruction({"SAE": sae}, store, held_out)
    heldout = RULE.model_copy(update={"split": "heldout"})
    both = store.selected(SITE, heldout) & store.selected(OTHER, heldout)
    assert (
        held_out.rows[held_out.part("without outliers")].tolist() == np.flatnonzero(both).tolist()
    )
    y = store.read(OTHER, 0, store.n_rows)[both].astype(np.float64)
    expected = np.square(y - vector.numpy()).sum() / np.square(y - y.mean(0)).sum()
    got = values(found["SAE", "without outliers"])["fvu"]
    assert got == pytest.approx(expected, rel=1e-6)


def test_intervals_follow_documents_and_hold_the_truth_as_often_as_they_say():
    """Rows of a document are equal: an interval over rows would be 10 times too narrow."""
    rng = np.random.default_rng(0)
    held = 0
    for seed in range(200):
        means = rng.standard_normal(100)
        sums = np.stack([np.full(100, 100.0), means * 100], axis=1)
        low, high = interval(sums, lambda s: s[..., 1] / s[..., 0], seed=seed)
        held += low <= 0 <= high
        assert 0.2 < high - low < 0.65  # 4 standard errors of 0.1
    assert 180 <= held <= 198  # 95 % of 200, three deviations around
    assert interval(sums[:1], lambda s: s[..., 1] / s[..., 0]) is None


def test_held_out_documents_are_in_all_clusters():
    hashes = np.random.default_rng(0).integers(0, 2**63, 20_000, dtype=np.uint64) >> np.uint64(5)
    counts = np.bincount(clusters_of(hashes), minlength=256)
    assert counts.min() > 40
    assert counts.max() < 130


def test_figures_become_a_table(store, held_out):
    found = reconstruction({"SAE": perfect(3)}, store, held_out)
    rows = list(found["SAE", "without outliers"].figures("SAE", "without outliers"))
    table = figures_table(rows)
    assert table.num_rows == len(rows)
    fvu = table.to_pylist()[0]
    assert fvu["metric"] == "fvu"
    assert fvu["low"] < fvu["value"] < fvu["high"]
    assert fvu["unit"] == "rows"
