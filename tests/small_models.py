"""A byte tokenizer and what the tests of models ask of any model."""

from __future__ import annotations

from pathlib import Path

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
