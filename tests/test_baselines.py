"""Baselines are what they say: the same k and norms, the axes of the training rows, their mean."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from sae_harvest.common.errors import DamagedError, InputError
from sae_harvest.pipelines.evaluate.baselines import (
    CHANNELS,
    MEAN,
    PCA,
    RANDOM,
    SHUFFLED,
    baselines,
)
from sae_harvest.store.objects import LocalObjects
from sae_harvest.store.reader import ActivationStore
from sae_harvest.store.rules import RowRule
from sae_harvest.train.config import SAEConfig
from sae_harvest.train.evaluate import Fvu
from sae_harvest.train.sae.sae import SAE
from tests.synthetic import OTHER, SITE, make_plan, make_store, make_two_sites, replace_array

RULE = RowRule(heldout_fraction=0.4)
D, N = 8, 24
NORMALIZATIONS = ("none", "scale", "unit_norm", "layer_norm")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> ActivationStore:
    """Rows of another variance in each dimension, around a mean that is not 0."""
    root = tmp_path_factory.mktemp("baselines") / "s"
    make_two_sites(root, 4)
    plan = make_plan().model_validate(ActivationStore.open(root).plan)
    for shard in range(4):
        x = np.random.default_rng(shard).standard_normal((128, D)) * np.linspace(0.5, 2, D) + 1
        replace_array(LocalObjects(root), plan, f"activations/{SITE}", shard, x.astype(np.float16))
    return ActivationStore.open(root)


def made(normalization: str = "none", target: bool = False, **fields) -> SAE:
    known = {
        "d_in": D,
        "n_latents": N,
        "activation": "jumprelu",
        "site": SITE,
        "rule": RULE,
        "normalization": normalization,
        "input_scale": 2.5 if normalization == "scale" else 1.0,
    }
    if target:
        known |= {"d_out": 24, "target_site": OTHER}
        known["output_scale"] = 0.4 if normalization == "scale" else 1.0
    config = SAEConfig.model_validate(known | fields)
    generator = torch.Generator().manual_seed(0)
    shapes = SAE.shapes(config).items()
    return SAE(config, **{name: torch.rand(s, generator=generator) for name, s in shapes})


def training_rows(store: ActivationStore, sae: SAE) -> np.ndarray:
    """The rows that the SAE should return for all rows that it was trained on, [rows, d_out]."""
    config = sae.config
    sites = [config.site, config.target_site or config.site]
    chosen = store.selected(sites[0], config.rule) & store.selected(sites[1], config.rule)
    return store.read(sites[1], 0, store.n_rows)[chosen].astype(np.float32)


def fvu(sae: SAE, x: np.ndarray) -> float | None:
    found = Fvu(x.shape[1])
    found.update(x, sae(torch.from_numpy(x)).numpy())
    return found.value


def normalised(x: np.ndarray, sae: SAE) -> np.ndarray:
    x = x.astype(np.float64)
    if sae.config.normalization == "unit_norm":
        return x / np.linalg.norm(x, axis=1, keepdims=True) * np.sqrt(D)
    if sae.config.normalization == "layer_norm":
        return (x - x.mean(1, keepdims=True)) / (x.std(1, ddof=1, keepdims=True) + 1e-5)
    return x / sae.config.input_scale


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_axes_are_those_of_numpy_on_the_same_rows(store, normalization):
    sae = made(normalization)
    rows = normalised(training_rows(store, sae), sae)
    _, _, expected = np.linalg.svd(rows - rows.mean(0), full_matrices=False)
    found = baselines(store, sae, 3.2)[PCA]
    axes = found.W_dec.numpy()
    assert axes.shape == (2 * D, D)
    assert np.array_equal(axes[D:], -axes[:D])
    assert np.array_equal(found.W_enc.numpy(), axes)
    along = np.abs((axes[:D] * expected).sum(1))
    spread = D - 1 if normalization == "layer_norm" else D  # its rows vary in d - 1 directions
    assert np.allclose(along[:spread], 1, atol=1e-5)
    assert np.allclose(found.b_dec.numpy(), rows.mean(0), atol=1e-6)


@pytest.mark.parametrize("name", [PCA, CHANNELS])
@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_the_largest_coordinates_reconstruct_a_row(store, normalization, name):
    sae = made(normalization)
    x = training_rows(store, sae)
    found = baselines(store, sae, 3)[name]
    rows = normalised(x, sae)
    axes = found.W_dec.numpy()[:D].astype(np.float64)
    coordinates = (rows - rows.mean(0)) @ axes.T
    smallest = np.sort(np.abs(coordinates), axis=1)[:, [D - 3]]
    kept = np.where(np.abs(coordinates) >= smallest, coordinates, 0) @ axes + rows.mean(0)
    got = normalised(found(torch.from_numpy(x)).numpy(), sae)
    if normalization in ("none", "scale"):
        assert np.allclose(got, kept, atol=1e-5)
    else:  # what is read again is normalised again
        assert np.allclose(got, normalised(kept, made(normalization)), atol=1e-3)
    assert fvu(baselines(store, sae, D)[name], x) == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize(
    ("normalization", "target"),
    [*((name, False) for name in NORMALIZATIONS), ("none", True), ("scale", True)],
)
def test_the_mean_predictor_has_fvu_1_on_training_rows(store, normalization, target):
    sae = made(normalization, target)
    x = training_rows(store, sae)
    mean = baselines(store, sae, 3)[MEAN]
    inputs = torch.randn(len(x), D)
    assert (mean.encode(inputs)[1] == 0).all()
    found = Fvu(x.shape[1])
    found.update(x, mean(inputs).numpy())
    assert found.value == pytest.approx(1, abs=1e-9)


@pytest.mark.parametrize("target", [False, True])
def test_random_directions_have_the_norms_of_the_sae(store, target):
    sae = made(target=target)
    found, again, other = (baselines(store, sae, 3, seed)[RANDOM] for seed in (1, 1, 2))
    for name in ("W_enc", "W_dec"):
        ours, theirs = (found.tensors()[name], sae.tensors()[name])
        assert torch.allclose(ours.norm(dim=1), theirs.norm(dim=1), rtol=1e-5)
        assert torch.equal(ours, again.tensors()[name])
        assert not torch.equal(ours, other.tensors()[name])
    if not target:  # an encoder row reads what its decoder row writes
        cosine = torch.nn.functional.cosine_similarity(found.W_enc, found.W_dec)
        assert torch.allclose(cosine, torch.ones(N))
    assert torch.equal(found.b_dec, sae.b_dec)
    assert (found.b_enc == 0).all()


def test_a_row_of_zeros_stays_one(store):
    sae = made()
    sae.W_dec[3] = 0
    assert (baselines(store, sae, 3)[RANDOM].W_dec[3] == 0).all()


def test_the_shuffled_decoder_has_the_same_rows_in_another_order(store):
    sae = made()
    found = baselines(store, sae, 3)[SHUFFLED]
    assert not torch.equal(found.W_dec, sae.W_dec)
    assert sorted(found.W_dec.tolist()) == sorted(sae.W_dec.tolist())
    for name, tensor in sae.tensors().items():
        if name != "W_dec":
            assert torch.equal(found.tensors()[name], tensor)
    x = torch.from_numpy(training_rows(store, sae)[:50])
    assert torch.equal(found.encode(x)[0], sae.encode(x)[0])


@pytest.mark.parametrize(("l0", "k"), [(0.0, 1), (3.4, 3), (3.6, 4), (7.0, 7), (20.2, 20)])
def test_k_is_the_l0_of_the_sae(store, l0, k):
    found = baselines(store, made(), l0)
    assert found[RANDOM].config.k == k
    assert {found[name].config.k for name in (PCA, CHANNELS)} == {min(k, D)}
    x = torch.from_numpy(training_rows(store, made())[:20])
    assert (found[PCA].encode(x)[1] > 0).sum(1).tolist() == [min(k, D)] * 20


def test_a_transcoder_has_no_axes_and_no_channels(store):
    assert set(baselines(store, made(target=True), 3)) == {RANDOM, SHUFFLED, MEAN}
    assert set(baselines(store, made(), 3)) == {RANDOM, SHUFFLED, MEAN, PCA, CHANNELS}


def test_only_training_rows_are_read(store, tmp_path):
    """Other numbers in rows that training leaves out change nothing."""
    make_store(tmp_path / "s")
    plan = make_plan()
    before = ActivationStore.open(tmp_path / "s")
    sae = made()
    expected = baselines(before, sae, 3)
    for shard in range(before.n_shards):
        first, last = before.shard_span(shard)
        x = before.read(SITE, first, last).copy()
        x[~before.selected_in_shard(SITE, RULE, shard)] = 7
        objects = LocalObjects(tmp_path / "s")
        replace_array(objects, plan, f"activations/{SITE}", shard, x)
    found = baselines(ActivationStore.open(tmp_path / "s"), sae, 3)
    for name in (PCA, MEAN):
        assert torch.equal(found[name].W_dec, expected[name].W_dec)
        assert torch.equal(found[name].b_dec, expected[name].b_dec)


def test_what_cannot_be_compared_with_is_refused(store, tmp_path: Path):
    rule = RowRule(heldout_fraction=1 - 1e-9)
    with pytest.raises(InputError, match="holds no row that the SAE was trained on"):
        baselines(store, made(rule=rule), 3)
    with pytest.raises(InputError, match="it has no site"):
        baselines(store, made(site="mlp_out.3"), 3)
    make_store(tmp_path / "s")
    x = ActivationStore.open(tmp_path / "s").read(SITE, 0, 128).copy()
    x[5] = np.nan
    replace_array(LocalObjects(tmp_path / "s"), make_plan(), f"activations/{SITE}", 0, x)
    with pytest.raises(DamagedError, match="row 5"):
        baselines(ActivationStore.open(tmp_path / "s"), made(rule=RowRule(heldout_fraction=0)), 3)
