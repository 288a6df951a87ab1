"""SAEs in other packages' formats, without those packages; `tests/interop` runs them."""

from __future__ import annotations

import json
from itertools import product

import click
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from sae_harvest.common.errors import InputError
from sae_harvest.store.rules import RowRule
from sae_harvest.train.commands.formats import add_format_commands
from sae_harvest.train.sae.formats import FORMATS, export_sae, format_named, import_sae
from sae_harvest.train.sae.formats.reading import Origin
from sae_harvest.train.sae.formats.saelens import hook_name, site_of
from sae_harvest.train.sae.sae import SAE
from tests.interop.exchange import (
    ORIGIN,
    D,
    K,
    N,
    assert_equal_outputs,
    random_sae,
    rows,
    run,
    written,
)

ACTIVATIONS = ("topk", "batchtopk", "jumprelu", "relu", "gated")
NORMALIZATIONS = ("none", "scale", "layer_norm", "unit_norm")
KINDS = [
    (a, n, None if d_out == "sae" else d_out)
    for a, n, d_out in product(ACTIVATIONS, NORMALIZATIONS, ("sae", D, 24))
    if d_out == "sae" or n in ("none", "scale")
]


def holds(name, activation, normalization, d_out):
    """The table of docs/formats.md."""
    plain = normalization in ("none", "scale")
    if name == "openai":
        kinds = [("topk", "layer_norm"), ("relu", "none"), ("relu", "scale")]
        return d_out is None and (activation, normalization) in kinds
    if name == "saelens":
        return d_out is None or activation in ("relu", "jumprelu", "batchtopk")
    if name == "sparsify":
        return activation == "topk" and plain and d_out in (None, D)
    return d_out is None and plain


HELD = [(name, *kind) for name in FORMATS for kind in KINDS if holds(name, *kind)]
NOT_HELD = [(name, *kind) for name in FORMATS for kind in KINDS if not holds(name, *kind)]


@pytest.mark.parametrize(("name", "activation", "normalization", "d_out"), HELD)
def test_written_and_read_again_gives_equal_outputs(
    tmp_path, name, activation, normalization, d_out
):
    sae = random_sae(activation, normalization, d_out)
    format_named(name).write(sae, tmp_path / "sae")
    again = format_named(name).read(tmp_path / "sae", ORIGIN)
    assert_equal_outputs(run(again, rows()), run(sae, rows()))
    assert (again.config.site, again.config.model) == (sae.config.site, sae.config.model)
    assert again.config.target_site == sae.config.target_site
    of_a_threshold = name == "saelens" and activation == "batchtopk"
    assert again.config.activation == ("jumprelu" if of_a_threshold else activation)


@pytest.mark.parametrize(("name", "activation", "normalization", "d_out"), NOT_HELD)
def test_what_a_format_cannot_hold_is_refused_and_nothing_written(
    tmp_path, name, activation, normalization, d_out
):
    with pytest.raises(InputError, match=r"^[^\n]+; [^\n]+\.$"):
        format_named(name).write(random_sae(activation, normalization, d_out), tmp_path / "sae")
    assert list(tmp_path.iterdir()) == []


def largest(pi, k):
    values, indices = pi.topk(k)
    return torch.zeros_like(pi).scatter(1, indices, values.relu())


def openai_formula(path, x):
    held = torch.load(path, weights_only=True)
    topk = held["activation"] == "TopK"
    mean, deviation = x.mean(1, keepdim=True), x.std(1, keepdim=True)
    normalised = (x - mean) / (deviation + 1e-5) if topk else x
    pi = (normalised - held["pre_bias"]) @ held["encoder.weight"].T + held["latent_bias"]
    v = largest(pi, held["activation_state_dict"]["k"]) if topk else pi.relu()
    sums = v @ held["decoder.weight"].T + held["pre_bias"]
    return v, sums * deviation + mean if topk else sums


def saelens_formula(path, x):
    fields = json.loads((path / "cfg.json").read_text())
    w = load_file(path / "sae_weights.safetensors")
    centre = w["b_dec"] if fields["apply_b_dec_to_input"] else 0.0
    mean, factor = 0.0, 1.0
    if fields["normalize_activations"] == "constant_norm_rescale":
        factor = x.norm(dim=1, keepdim=True) / D**0.5
    pre = x / factor
    if fields["normalize_activations"] == "layer_norm":
        mean, factor = x.mean(1, keepdim=True), x.std(1, keepdim=True)
        pre = (x - mean) / (factor + 1e-5)
    product_ = (pre - centre) @ w["W_enc"]
    if fields["architecture"] == "gated":
        magnitude = (product_ * w["r_mag"].exp() + w["b_mag"]).relu()
        v = magnitude * (product_ + w["b_gate"] > 0)
    else:
        pi = product_ + w["b_enc"]
        v = largest(pi, fields["k"]) if fields["architecture"] == "topk" else pi.relu()
        v = v * (pi > w["threshold"]) if "threshold" in w else v
    return v, (v @ w["W_dec"] + w["b_dec"]) * factor + mean


def sparsify_formula(path, x):
    fields = json.loads((path / "cfg.json").read_text())
    w = load_file(path / "sae.safetensors")
    centred = x if fields["transcode"] else x - w["b_dec"]
    v = largest(centred @ w["encoder.weight"].T + w["encoder.bias"], fields["k"])
    return v, v @ w["W_dec"] + w["b_dec"]


def dictionary_learning_formula(path, x):
    kind = json.loads((path / "config.json").read_text())["trainer"]["dict_class"]
    w = torch.load(path / "ae.pt", weights_only=True)
    if kind == "JumpReluAutoEncoder":
        pi = x @ w["W_enc"] + w["b_enc"]
        v = pi * (pi > w["threshold"])
        return v, v @ w["W_dec"] + w["b_dec"]
    bias = {"AutoEncoder": "bias", "GatedAutoEncoder": "decoder_bias"}.get(kind, "b_dec")
    product_ = (x - w[bias]) @ w["encoder.weight"].T
    if kind == "GatedAutoEncoder":
        magnitude = (product_ * w["r_mag"].exp() + w["mag_bias"]).relu()
        v = magnitude * (product_ + w["gate_bias"] > 0)
    else:
        pi = product_ + w["encoder.bias"]
        v = largest(pi, int(w["k"])) if kind == "AutoEncoderTopK" else pi.relu()
        v = v * (pi > w["threshold"]) if kind == "BatchTopKSAE" else v
    return v, v @ w["decoder.weight"].T + w[bias]


FORMULAS = {
    "openai": openai_formula,
    "saelens": saelens_formula,
    "sparsify": sparsify_formula,
    "dictionary_learning": dictionary_learning_formula,
}


@pytest.mark.parametrize(("name", "activation", "normalization", "d_out"), HELD)
def test_the_formats_own_formula_gives_our_outputs(
    tmp_path, name, activation, normalization, d_out
):
    sae = random_sae(activation, normalization, d_out)
    format_named(name).write(sae, tmp_path / "sae")
    latents, reconstruction = FORMULAS[name](tmp_path / "sae", rows())
    found = {"latents": latents, "reconstruction": reconstruction}
    assert_equal_outputs(found, run(sae, rows()))


def test_half_precision_weights_are_read_as_float32(tmp_path):
    path = written("sparsify", tmp_path)
    held = {name: t.bfloat16() for name, t in load_file(path / "sae.safetensors").items()}
    save_file(held, path / "sae.safetensors")
    sae = format_named("sparsify").read(path, ORIGIN)
    assert sae.W_enc.dtype == torch.float32
    assert torch.equal(sae.W_enc, held["encoder.weight"].float())


def test_the_origin_is_kept_where_there_is_a_place_for_it(tmp_path):
    plain = random_sae("topk")
    known = {"model_weights": "abc", "rule": RowRule(max_norm_medians=9)}
    sae = SAE(plain.config.model_copy(update=known), **plain.tensors())
    for name in ("saelens", "sparsify", "dictionary_learning"):
        format_named(name).write(sae, tmp_path / name)
        assert sae.digest in "".join(f.read_text() for f in (tmp_path / name).glob("*.json"))
        again = format_named(name).read(tmp_path / name, Origin())
        assert again.config == sae.config
        other = format_named(name).read(tmp_path / name, Origin("mlp_out.9", None, "other")).config
        assert (other.site, other.model, other.model_weights) == ("mlp_out.9", "other", "")


def test_a_file_without_a_site_needs_one(tmp_path):
    with pytest.raises(InputError, match="give --site"):
        format_named("openai").read(written("openai", tmp_path), Origin())


def test_an_sae_takes_no_target_site(tmp_path):
    with pytest.raises(InputError, match="leave out --target-site"):
        format_named("openai").read(
            written("openai", tmp_path), Origin("resid_post.1", "mlp_out.1")
        )


def test_sites_have_the_names_of_transformer_lens():
    assert hook_name("resid_post.12") == "blocks.12.hook_resid_post"
    assert hook_name("mlp_act.0") == "blocks.0.mlp.hook_post"
    for kind in ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out", "mlp_act"):
        assert site_of(hook_name(f"{kind}.7")) == f"{kind}.7"
    assert site_of("blocks.3.attn.hook_z") is None
    assert site_of(None) is None


def test_a_decoder_that_is_not_unit_is_not_called_normalised(tmp_path):
    for normalization, unit in (("none", True), ("scale", False)):
        path = tmp_path / normalization
        format_named("sparsify").write(random_sae("topk", normalization), path)
        assert json.loads((path / "cfg.json").read_text())["normalize_decoder"] is unit


@pytest.fixture
def command():
    group = click.Group("train-sae")
    add_format_commands(group)
    return lambda *words: CliRunner().invoke(group, [str(word) for word in words])


def test_commands_export_and_import(command, tmp_path):
    sae = random_sae("jumprelu", "scale")
    sae.save(tmp_path / "sae")
    out, again = tmp_path / "deep" / "saelens", tmp_path / "again"
    done = command("export", "--sae", tmp_path / "sae", "--format", "saelens", "--out", out)
    assert (done.exit_code, done.output) == (0, f"Wrote SAE {sae.digest} to {out} for saelens.\n")
    done = command("import", "--format", "saelens", "--from", out, "--out", again)
    assert done.exit_code == 0, done.output
    assert "for resid_post.3" in done.output
    assert_equal_outputs(run(SAE.load(again), rows()), run(sae, rows()))


def test_nothing_is_overwritten(tmp_path):
    random_sae("topk").save(tmp_path / "sae")
    with pytest.raises(InputError, match="exists and would be overwritten"):
        export_sae(tmp_path / "sae", "sparsify", tmp_path / "sae")
    (tmp_path / "empty").mkdir()
    export_sae(tmp_path / "sae", "sparsify", tmp_path / "empty")
    with pytest.raises(InputError, match="exists and would be overwritten"):
        import_sae("sparsify", tmp_path / "empty", tmp_path / "sae", ORIGIN)


def test_an_unknown_format_is_refused(command):
    with pytest.raises(InputError, match="choose one of openai, saelens"):
        format_named("gguf")
    assert command("export", "--sae", "x", "--format", "gguf", "--out", "y").exit_code == 2


def test_a_topk_of_all_latents_stays_one(tmp_path):
    sae = random_sae("topk")
    config = sae.config.model_copy(update={"k": N})
    format_named("sparsify").write(SAE(config, **sae.tensors()), tmp_path / "sae")
    assert format_named("sparsify").read(tmp_path / "sae", ORIGIN).config.k == N
    assert K < N
