"""Files of other packages that are damaged, malicious, or say what ours cannot do."""

from __future__ import annotations

import errno
import json
import os
import pickle
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from sae_harvest.common.errors import InputError, RunError, SaeHarvestError
from sae_harvest.train.sae.formats import FORMATS, export_sae, format_named, import_sae
from sae_harvest.train.sae.formats.pickles import read_pt
from tests.interop.exchange import ORIGIN, D, assert_equal_outputs, random_sae, rows, run, written


class Malicious:
    """A pickle of it makes a folder wherever it is loaded."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self):
        return (os.mkdir, (str(self.trace),))


@pytest.mark.parametrize("by", ["torch.save", "pickle"])
@pytest.mark.parametrize("name", ["openai", "dictionary_learning"])
def test_a_malicious_pickle_is_refused_and_not_run(tmp_path, name, by):
    trace, path = tmp_path / "trace", tmp_path / "sae"
    format_named(name).write(random_sae("topk", "layer_norm" if name == "openai" else "none"), path)
    file = path if name == "openai" else path / "ae.pt"
    held = torch.load(file, weights_only=True) | {"more": Malicious(trace)}
    if by == "torch.save":
        torch.save(held, file)
    else:
        file.write_bytes(pickle.dumps(held))
    with pytest.raises(SaeHarvestError) as caught:
        format_named(name).read(path, ORIGIN)
    assert not trace.exists()
    assert "\n" not in str(caught.value)
    if by == "torch.save":
        assert "unsafe pickle" in str(caught.value)
        assert "posix.mkdir" in str(caught.value)


def files_of(path):
    return [path] if path.is_file() else sorted(path.iterdir())


@pytest.mark.parametrize("name", FORMATS)
def test_damaged_files_are_refused_in_one_sentence(tmp_path, name):
    path = written(name, tmp_path)
    for file in files_of(path):
        whole = file.read_bytes()
        cuts = [whole[: len(whole) * i // 7] for i in range(7)]
        others = [b"\x80\x02garbage", b"[]", b"{}", b"null", b"\xff\xfe", whole[::-1]]
        for harmed in (*cuts, *others):
            file.write_bytes(harmed)
            with pytest.raises(SaeHarvestError) as caught:
                format_named(name).read(path, ORIGIN)
            assert "\n" not in str(caught.value)
        file.unlink()
        with pytest.raises(SaeHarvestError):
            format_named(name).read(path, ORIGIN)
        file.write_bytes(whole)
    format_named(name).read(path, ORIGIN)


@pytest.mark.parametrize("name", FORMATS)
def test_a_path_with_nothing_is_refused(tmp_path, name):
    with pytest.raises(InputError, match="none"):
        format_named(name).read(tmp_path / "none", ORIGIN)


def change_json(path, **fields):
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"activation": "groupmax"}, "groupmax"),
        ({"skip_connection": True}, "skip connection"),
        ({"signed": True}, "below zero"),
        ({"k": 1000}, "k must be at most"),
        ({"k": "8"}, "expected int"),
        ({"k": None}, "lacks k"),
        ({"d_in": 17}, r"expected floating point \['any', 17\]"),
        ({"transcode": True}, "--target-site"),
    ],
)
def test_settings_that_ours_has_not_are_refused(tmp_path, fields, message):
    path = written("sparsify", tmp_path)
    change_json(path / "cfg.json", **fields)
    with pytest.raises(SaeHarvestError, match=message):
        format_named("sparsify").read(path, ORIGIN)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"architecture": "abstopk"}, "abstopk"),
        ({"reshape_activations": "hook_z"}, "attention heads"),
        ({"normalize_activations": "covariance_whitening"}, "covariance_whitening"),
        ({"normalize_activations": "expected_average_only_in"}, "expected_average_only_in"),
        ({"architecture": "batchtopk", "k": 1e999}, "finite"),
        ({"k": 8.4}, "expected int"),
        ({"metadata": {"sae_lens_version": "5.10.0"}}, "5.10.0"),
        ({"metadata": {}}, "before version 6"),
    ],
)
def test_saelens_settings_that_ours_has_not_are_refused(tmp_path, fields, message):
    path = written("saelens", tmp_path)
    change_json(path / "cfg.json", **fields)
    with pytest.raises(SaeHarvestError, match=message):
        format_named("saelens").read(path, ORIGIN)


def test_a_saelens_checkpoint_brings_its_scale(tmp_path):
    path = written("saelens", tmp_path)
    change_json(path / "cfg.json", normalize_activations="expected_average_only_in")
    (path / "activation_scaler.json").write_text('{"scaling_factor": 0.25}')
    sae = format_named("saelens").read(path, ORIGIN)
    unscaled = run(random_sae("topk"), rows() * 0.25)
    unscaled["reconstruction"] *= 4
    assert_equal_outputs(run(sae, rows()), unscaled)


def test_openai_activations_that_ours_has_not_are_refused(tmp_path):
    path = written("openai", tmp_path)
    held = torch.load(path, weights_only=True)
    for change, message in (
        ({"activation": "Identity"}, "Identity"),
        ({"activation_state_dict": {"k": 8, "postact_fn": "Identity"}}, "lets Identity follow"),
        ({"activation_state_dict": {}}, "how many latents"),
        ({"decoder.bias": torch.zeros(D)}, "decoder.bias"),
    ):
        torch.save(held | change, path)
        with pytest.raises(SaeHarvestError, match=message):
            format_named("openai").read(path, ORIGIN)


def dictionary_learning(path, activation, change=(), drop=(), **trainer):
    """An export with other tensors, and other fields of its config.json's trainer."""
    format_named("dictionary_learning").write(random_sae(activation), path)
    held = torch.load(path / "ae.pt", weights_only=True) | dict(change)
    torch.save({name: held[name] for name in held if name not in drop}, path / "ae.pt")
    config = json.loads((path / "config.json").read_text())
    config["trainer"] |= trainer
    (path / "config.json").write_text(json.dumps(config))
    return format_named("dictionary_learning").read(path, ORIGIN)


def test_k_of_dictionary_learning_is_in_either_file(tmp_path):
    k = random_sae("topk").config.k
    assert dictionary_learning(tmp_path / "a", "topk", drop=["k"]).config.k == k
    assert dictionary_learning(tmp_path / "b", "topk", k=None).config.k == k
    assert dictionary_learning(tmp_path / "c", "batchtopk", drop=["k"]).config.k == k
    for number, stated in enumerate((None, "8", True, [])):
        with pytest.raises(RunError, match=r"neither ae\.pt nor config\.json"):
            dictionary_learning(tmp_path / f"d{number}", "topk", drop=["k"], k=stated)
    with pytest.raises(RunError, match=rf"k {k} in ae\.pt and {k + 1} in config\.json"):
        dictionary_learning(tmp_path / "e", "topk", k=k + 1)


@pytest.mark.parametrize("change", [{"threshold": torch.tensor(-1.0)}, {}])
def test_a_batchtopk_without_a_threshold_is_told_what_can_be_done(tmp_path, change):
    drop = [] if change else ["threshold"]
    with pytest.raises(InputError, match=r"no threshold.* set dict_class to AutoEncoderTopK"):
        dictionary_learning(tmp_path / "sae", "batchtopk", change, drop)
    told = dictionary_learning(
        tmp_path / "told", "batchtopk", change, drop, dict_class="AutoEncoderTopK"
    )
    plain = random_sae("batchtopk")
    assert (told.config.activation, told.config.k) == ("topk", plain.config.k)
    assert torch.equal(told.b_enc, plain.b_enc)


def test_a_pt_file_that_would_expand_is_refused(tmp_path):
    torch.save({"pre_bias": torch.zeros(100_000)}, tmp_path / "plain.pt")
    with (
        zipfile.ZipFile(tmp_path / "plain.pt") as plain,
        zipfile.ZipFile(tmp_path / "bomb.pt", "w", zipfile.ZIP_DEFLATED) as bomb,
    ):
        for name in plain.namelist():
            bomb.writestr(name, plain.read(name))
    with pytest.raises(RunError, match="compressed entries"):
        read_pt(tmp_path / "bomb.pt")


@pytest.mark.parametrize("name", FORMATS)
def test_an_export_that_fails_leaves_nothing(tmp_path, monkeypatch, name):
    activation = "topk" if name == "sparsify" else "relu"
    random_sae(activation).save(tmp_path / "sae")
    export_sae(tmp_path / "sae", name, tmp_path / "peer")

    def fail(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(RunError, match="No space left"):
        export_sae(tmp_path / "sae", name, tmp_path / "out" / "exported")
    with pytest.raises(RunError, match="No space left"):
        import_sae(name, tmp_path / "peer", tmp_path / "out" / "imported", ORIGIN)
    assert not (tmp_path / "out").exists() or not any((tmp_path / "out").iterdir())


def test_unknown_tensors_and_numbers_that_are_not_finite_are_refused(tmp_path):
    path = written("sparsify", tmp_path)
    held = load_file(path / "sae.safetensors")
    save_file(held | {"W_skip": torch.zeros(D, D)}, path / "sae.safetensors")
    with pytest.raises(InputError, match="W_skip"):
        format_named("sparsify").read(path, ORIGIN)
    held["b_dec"][3] = torch.nan
    save_file(held, path / "sae.safetensors")
    with pytest.raises(RunError, match="b_dec that are not finite"):
        format_named("sparsify").read(path, ORIGIN)
