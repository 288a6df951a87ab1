"""A byte tokenizer and what the tests of models ask of any model."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
import tokenizers
import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from sae_harvest.common.errors import InputError
from sae_harvest.harvest.model.models import load_config, load_model, load_tokenizer, resolve_model

VOCABULARY, WIDTH, LAYERS = 258, 32, 2
IDS = torch.arange(3, 19).view(2, 8)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    tokens = ["<|endoftext|>", *alphabet, "th"]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, merges=[("t", "h")]))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>")


def write_gguf(path: Path) -> None:
    """A small Llama with a byte tokenizer, as a float32 GGUF file."""
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


def logits(folder: str | Path) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        return model(IDS).logits


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
