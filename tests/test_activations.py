"""Every activation function in use: encode, decode, save and load; transcoders; old files."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import numba
import pytest
import torch

from sae_harvest.common.errors import RunError
from sae_harvest.train.config import SAEConfig
from sae_harvest.train.sae.sae import SAE
from tests.forked import SERVER
from tests.test_objectives import config_of, k_of, make_sae, rows

ACTIVATIONS = ["topk", "batchtopk", "jumprelu", "relu_l1", "gated"]


@pytest.fixture(params=[None, 17], ids=["sae", "transcoder"])
def d_out(request):
    return request.param


@pytest.fixture(params=ACTIVATIONS)
def sae(request, d_out):
    config = config_of(
        activation=request.param,
        target_site=None if d_out is None else "mlp_out.1",
        **k_of(request.param),
    )
    return make_sae(config, d_out=d_out)


def dense_values(sae, x):
    """v by the formulas of `train.sae.sae`, float64 [batch, n_latents]."""
    w = {name: tensor.double() for name, tensor in sae.tensors().items()}
    centred = x.double() / sae.config.input_scale - w.get("b_in", w["b_dec"])
    pi = centred @ w["W_enc"].T + w["b_enc"]
    match sae.config.activation:
        case "topk":
            least = pi.topk(sae.config.k, dim=1).values[:, -1:]
            return torch.relu(pi) * (pi >= least)
        case "relu":
            return torch.relu(pi)
        case "gated":
            magnitude = torch.relu(w["r_mag"].exp() * (pi - w["b_enc"]) + w["b_mag"])
            return (pi > 0) * magnitude
    return pi * (pi > w["threshold"])


def test_encode_and_decode_are_the_formulas(sae):
    x = rows(90)
    indices, values = sae.encode(x)
    expected = dense_values(sae, x)
    assert indices.dtype == torch.int32
    assert values.dtype == torch.float32
    assert (values[:, :-1] >= values[:, 1:]).all()
    found = torch.zeros_like(expected).scatter_add_(1, indices.long(), values.double())
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    most = int((expected > 0).sum(1).max())
    assert values.shape[1] == (sae.config.k if sae.config.activation == "topk" else most)
    scale = sae.config.output_scale if sae.config.is_transcoder else sae.config.input_scale
    x_hat = (expected @ sae.W_dec.double() + sae.b_dec.double()) * scale
    got = sae.decode(indices, values)
    torch.testing.assert_close(got.double(), x_hat, rtol=1e-4, atol=1e-4)


def encode_at_once():
    numba.config.THREADING_LAYER = "workqueue"  # which ends a process with two callers
    for activation in ACTIVATIONS:
        config = config_of(activation=activation, **k_of(activation))
        alone, shared = make_sae(config), make_sae(config)
        x = [rows(300), rows(200), rows(100)]
        expected = [alone.encode(some) for some in x]
        together = Barrier(len(x))

        def encode(some, shared=shared, together=together):
            torch.set_num_threads(1)
            together.wait()  # and finds it without its codes
            return shared.encode(some)

        with ThreadPoolExecutor(len(x)) as pool:
            for found, wanted in zip(pool.map(encode, x), expected, strict=True):
                assert all(map(torch.equal, found, wanted))


def test_several_threads_may_encode_at_once():
    process = SERVER.Process(target=encode_at_once)
    process.start()
    process.join(120)
    assert process.exitcode == 0


def test_rows_without_active_latents_decode_to_the_offset(sae):
    sae.b_enc -= 1000
    indices, values = sae.encode(rows(5))
    assert (values == 0).all()
    assert values.shape[1] == (sae.config.k or 1) or sae.config.activation == "batchtopk"
    scale = sae.config.output_scale if sae.config.is_transcoder else sae.config.input_scale
    torch.testing.assert_close(sae.decode(indices, values), (sae.b_dec * scale).expand(5, -1))
    none, zero = sae.encode(rows(5)[:0])
    assert len(none) == len(zero) == 0


def test_saved_and_loaded_is_the_same(sae, tmp_path):
    sae.save(tmp_path)
    loaded = SAE.load(tmp_path)
    assert loaded.config == sae.config
    assert loaded.digest == sae.digest
    assert loaded.tensors().keys() == sae.tensors().keys()
    x = rows(20)
    for got, expected in zip(loaded.encode(x), sae.encode(x), strict=True):
        assert torch.equal(got, expected)


def test_tensors_of_another_activation_are_refused(tmp_path):
    sae = make_sae(config_of(activation="jumprelu", k=8))
    sae.save(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"activation": "relu"}))
    with pytest.raises(RunError, match=r"has tensors .*threshold.*expected"):
        SAE.load(tmp_path)
    tensors = sae.tensors()
    with pytest.raises(RunError, match="negative thresholds"):
        SAE(sae.config, **(tensors | {"threshold": -tensors["threshold"]}))


def test_configurations_from_before_other_activations_still_load():
    old = {
        "d_in": 48,
        "n_latents": 3000,
        "k": 16,
        "activation": "topk",
        "site": "resid_post.3",
        "normalization": "scale",
        "input_scale": 2.5,
        "rule": {"max_norm_medians": 5.0, "heldout_fraction": 0.05, "split": "train"},
        "model": "smollm2-135m",
        "model_weights": "abc",
    }
    config = SAEConfig.model_validate(old)
    assert (config.k, config.activation, config.width_out) == (16, "topk", 48)
    assert not config.is_transcoder
