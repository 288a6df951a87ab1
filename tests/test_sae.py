"""The dictionary: encode, decode, save, load."""

from __future__ import annotations

import json

import pytest
import torch
from pydantic import ValidationError

from sae_harvest.common.errors import InputError, RunError, SaeHarvestError
from sae_harvest.train.config import SAEConfig, TrainConfig
from sae_harvest.train.sae.sae import SAE


def make_sae(n_latents=3000, d_in=48, k=16, scale=2.5):
    generator = torch.Generator().manual_seed(0)
    dec = torch.nn.functional.normalize(torch.randn(n_latents, d_in, generator=generator))
    config = SAEConfig(
        d_in=d_in,
        n_latents=n_latents,
        k=k,
        site="resid_post.3",
        normalization="scale",
        input_scale=scale,
    )
    return SAE(
        config,
        W_enc=dec.clone(),
        W_dec=dec,
        b_enc=0.1 * torch.randn(n_latents, generator=generator),
        b_dec=torch.randn(d_in, generator=generator),
    )


@pytest.fixture
def sae():
    return make_sae()


@pytest.fixture
def x():
    return 5 * torch.randn(700, 48, generator=torch.Generator().manual_seed(1))


def dense(sae, x):
    """float64: (k largest indices and values, reconstruction)."""
    weights = {name: tensor.double() for name, tensor in sae.tensors().items()}
    preactivations = (x.double() / sae.config.input_scale - weights["b_dec"]) @ weights["W_enc"].T
    values, indices = torch.relu(preactivations + weights["b_enc"]).topk(sae.config.k, dim=1)
    latents = torch.zeros_like(preactivations).scatter(1, indices, values)
    return indices, values, (latents @ weights["W_dec"] + weights["b_dec"]) * sae.config.input_scale


def test_encode_chooses_as_float64_does_and_values_are_exact(sae, x):
    indices, values = sae.encode(x)
    expected_indices, expected_values, _ = dense(sae, x)
    assert indices.dtype == torch.int32
    assert values.dtype == torch.float32
    agree = torch.eq(indices.sort(1).values, expected_indices.sort(1).values).all(1)
    assert agree.all()
    torch.testing.assert_close(values.double(), expected_values, rtol=1e-5, atol=1e-5)


def test_decode_is_the_formula(sae, x):
    torch.testing.assert_close(
        sae.decode(*sae.encode(x)).double(), dense(sae, x)[2], rtol=1e-4, atol=1e-4
    )


def test_values_are_never_negative_and_rows_are_independent(sae, x):
    sae.b_enc -= 4.5
    indices, values = sae.encode(x)
    assert (values >= 0).all()
    assert (values == 0).any()
    part_indices, part_values = sae.encode(x[5:9])
    assert torch.equal(part_values, values[5:9])
    active = part_values > 0
    assert torch.equal(part_indices[active], indices[5:9][active])


def test_half_precision_rows_are_read(sae, x):
    half = x.half()
    assert torch.equal(sae.encode(half)[1], sae.encode(half.float())[1])


def test_k_may_be_all_latents():
    small = make_sae(n_latents=6, d_in=4, k=6)
    indices, _ = small.encode(torch.randn(5, 4))
    assert indices.sort(1).values.tolist() == [[0, 1, 2, 3, 4, 5]] * 5


def test_low_precision_copy_follows_the_weights(sae, x):
    before = sae.encode(x)[1]
    sae.W_enc.neg_()
    sae.weights_changed()
    torch.testing.assert_close(sae.encode(x)[1].double(), dense(sae, x)[1], rtol=1e-5, atol=1e-5)
    assert not torch.equal(before, sae.encode(x)[1])


def test_saved_and_loaded_is_the_same(sae, x, tmp_path):
    sae.save(tmp_path / "sae")
    loaded = SAE.load(tmp_path / "sae")
    assert loaded.config == sae.config
    assert loaded.digest == sae.digest
    assert torch.equal(loaded.encode(x)[1], sae.encode(x)[1])
    assert sorted(p.name for p in (tmp_path / "sae").iterdir()) == [
        "config.json",
        "sae.safetensors",
    ]


def test_digest_depends_on_weights_and_configuration(sae):
    digest = sae.digest
    sae.b_dec[0] += 1
    assert sae.digest != digest
    assert make_sae(scale=2.0).digest != make_sae(scale=2.5).digest


def test_rows_of_another_width_are_refused(sae):
    with pytest.raises(InputError, match=r"48 dimensions, got rows of shape \[3, 32\]; use"):
        sae.encode(torch.zeros(3, 32))


def test_a_folder_without_an_sae_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"holds no trained SAE .*--out folder"):
        SAE.load(tmp_path)


def cut(folder):
    path = folder / "sae.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def garble(folder):
    (folder / "config.json").write_text("{", encoding="utf-8")


def remove_tensors(folder):
    (folder / "sae.safetensors").unlink()


def change_width(folder):
    path = folder / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"d_in": 32}), encoding="utf-8")


def unknown_activation(folder):
    path = folder / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"activation": "swish"}), encoding="utf-8")


@pytest.mark.parametrize("harm", [cut, garble, remove_tensors, change_width, unknown_activation])
def test_damaged_files_are_refused_in_one_sentence(sae, tmp_path, harm):
    sae.save(tmp_path)
    harm(tmp_path)
    with pytest.raises(RunError) as caught:
        SAE.load(tmp_path)
    message = str(caught.value)
    assert "\n" not in message
    assert ";" in message


def test_errors_are_of_the_one_tree():
    assert issubclass(RunError, SaeHarvestError)
    assert issubclass(InputError, SaeHarvestError)


@pytest.mark.parametrize(
    "change",
    [{"k": 0}, {"k": 65}, {"n_latents": 0}, {"tokens": 10}, {"lr": 0}, {"nonsense": 1}],
)
def test_configurations_out_of_bounds_are_refused(change):
    fine = {"n_latents": 64, "k": 4, "tokens": 10_000}
    TrainConfig.model_validate(fine)
    with pytest.raises(ValidationError):
        TrainConfig.model_validate(fine | change)


def test_defaults_scale_as_the_paper_says():
    config = TrainConfig(n_latents=2**14, k=32, tokens=10_000)
    assert config.learning_rate == pytest.approx(2e-3)
    assert config.model_copy(update={"n_latents": 2**16}).learning_rate == pytest.approx(1e-3)
    assert config.auxiliary_k(768) == 512
    assert config.auxiliary_k(576) == 256
    assert config.steps == 2
    # AuxK is to act in short runs as well: a tenth of the rows, within bounds
    for tokens, expected in ((10_000, 4096), (2_000_000, 200_000), (10**9, 10_000_000)):
        assert config.model_copy(update={"tokens": tokens}).dead_after == expected
    assert config.model_copy(update={"dead_after_tokens": 7}).dead_after == 7


def test_every_field_says_what_it_is():
    for model in (SAEConfig, TrainConfig):
        for name, field in model.model_fields.items():
            assert field.description, name
