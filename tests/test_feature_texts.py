"""Tokens as text, and the tokens a latent speaks for."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedTokenizerFast,
)

from sae_harvest.harvest.model.models import load_tokenizer, resolve_model
from sae_harvest.pipelines.features.counting.lens import logit_lens
from sae_harvest.pipelines.features.tables.texts import TokenTexts

TEXT = "the café of 東京 — 🙂🙃 naïve ça Ωmega \ufffd ok\n\tthe bridge 漢字かな"


@pytest.fixture(scope="module")
def byte_level(model_folder):
    return load_tokenizer(resolve_model(str(model_folder)))


@pytest.fixture(scope="module")
def byte_fallback():
    """Words with spaces in front, unknown characters as bytes, the text's first space dropped."""
    vocabulary = {"<unk>": 0, "<s>": 1}
    vocabulary |= {f"<0x{byte:02X}>": byte + 2 for byte in range(256)}
    for piece in ("▁", "a", "t", "h", "e", "c", "▁t", "he", "▁the", "▁a", "▁c", "at", "▁cat"):
        vocabulary[piece] = len(vocabulary)
    merges = ["▁ t", "h e", "▁t he", "▁ a", "▁ c", "a t", "▁c at"]
    pairs = [tuple(merge.split()) for merge in merges]
    backend = Tokenizer(models.BPE(vocabulary, pairs, unk_token="<unk>", byte_fallback=True))
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", bos_token="<s>")


def ids_of(tokenizer, text):
    return np.array(tokenizer.encode(text, add_special_tokens=False), np.int32)


def test_texts_of_every_window_join_to_its_text(byte_level):
    texts, ids = TokenTexts(byte_level), ids_of(byte_level, TEXT)
    assert "".join(texts.window(ids)) == TEXT
    for start in range(len(ids)):  # windows cut characters at both ends
        for stop in range(start + 1, len(ids) + 1):
            window = texts.window(ids[start:stop])
            assert len(window) == stop - start
            assert "".join(window) == byte_level.decode(ids[start:stop].tolist())


def test_a_split_character_stands_at_its_last_token(byte_level):
    texts, ids = TokenTexts(byte_level), ids_of(byte_level, "🙂漢")
    window = texts.window(ids)
    offsets = byte_level("🙂漢", return_offsets_mapping=True)["offset_mapping"]
    last = [max(n for n, (a, b) in enumerate(offsets) if a <= c < b) for c in (0, 1)]
    assert len(ids) > 4
    assert {n: text for n, text in enumerate(window) if text} == dict(
        zip(last, "🙂漢", strict=True)
    )
    # half a character at the start says so, and does not hide the whole one after it
    assert "".join(texts.window(ids[1:])).strip("\ufffd") == "漢"
    assert texts.window(ids[1:])[-1].endswith("漢")


def test_many_windows_at_once_are_those_of_each_alone(byte_level, byte_fallback):
    rng = np.random.default_rng(0)
    for tokenizer in (byte_level, byte_fallback):
        texts = TokenTexts(tokenizer)
        ids = ids_of(tokenizer, TEXT)
        some = np.stack([rng.choice(ids, 7) for _ in range(200)])  # characters cut everywhere
        some[0], some[1] = ids[:7], ids_of(tokenizer, "the the the the the the the the")[:7]
        joined, ends = texts.windows(some)
        each = [texts.window(line) for line in some]
        assert joined.to_pylist() == ["".join(line) for line in each]
        assert ends.tolist() == [np.cumsum([len(t) for t in line]).tolist() for line in each]
        assert texts.of(ids).to_pylist() == [texts.table[i] for i in ids.tolist()]
        assert texts.windows(some[:0])[0].to_pylist() == texts.of(ids[:0]).to_pylist() == []
        assert texts.window(ids[:0]) == []


def test_spaces_survive_a_decoder_that_drops_the_first(byte_fallback):
    ids = ids_of(byte_fallback, "the cat 東京 the")
    assert byte_fallback.decode([int(ids[1])]) == "cat"  # which is the trap
    texts = TokenTexts(byte_fallback)
    window = texts.window(ids)
    assert window[:2] == [" the", " cat"]
    assert [text for text in window if text] == [" the", " cat", " ", "東", "京", " the"]
    assert "".join(window) == " " + byte_fallback.decode(ids.tolist())
    assert texts.one(int(ids[0])) == " the"


def test_every_id_has_a_text_though_the_vocabulary_has_holes():
    backend = Tokenizer(models.WordLevel({"a": 0, "b": 2, "z": 9}, unk_token="a"))
    texts = TokenTexts(PreTrainedTokenizerFast(tokenizer_object=backend))
    assert len(texts) == 10
    assert texts.one(9).strip() == "z"
    assert texts.one(5) == ""


FAMILIES = {
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
    "llama": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4},
    "gemma2": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4},
}
SMALL = {"intermediate_size": 48, "num_key_value_heads": 2, "head_dim": 8}
PADDED = 500


@pytest.fixture(params=FAMILIES)
def network(request, tmp_path, byte_level):
    """(folder, model, scale of the final norm) with 100 rows of padding after the 400 tokens."""
    fields = FAMILIES[request.param] | ({} if request.param == "gpt2" else SMALL)
    special = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    config = AutoConfig.for_model(request.param, vocab_size=PADDED, **fields, **special)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    final = model.transformer.ln_f if request.param == "gpt2" else model.model.norm
    with torch.no_grad():
        model.get_output_embeddings().weight[400:] *= 100  # padding must not win
        final.weight.copy_(torch.rand(32) + 0.5)
        if request.param == "gpt2":
            final.bias.copy_(torch.randn(32))
    model.save_pretrained(tmp_path)
    byte_level.save_pretrained(tmp_path)
    scale = final.weight.detach() + (1 if request.param == "gemma2" else 0)
    return tmp_path, model, scale


def test_logit_lens_is_unembedding_of_scaled_decoder_rows(network, byte_level):
    folder, model, scale = network
    W_dec = torch.randn(700, 32, generator=torch.Generator().manual_seed(1))
    n_tokens = len(TokenTexts(byte_level))
    assert n_tokens <= 400
    lens = logit_lens(resolve_model(str(folder)), "resid_post.1", W_dec, 6, n_tokens)
    unembed = model.get_output_embeddings().weight.detach().double()[:n_tokens]
    logits = (W_dec.double() * scale.double()) @ unembed.T
    logits = (logits - logits.mean(dim=1, keepdim=True)).numpy()
    tolerance = 1e-5 * np.abs(logits).max()  # float32
    for i in range(0, 700, 7):
        for tokens, found, sign in (
            (lens.top[i], lens.top_logits[i], 1),
            (lens.bottom[i], lens.bottom_logits[i], -1),
        ):
            expected = sign * np.sort(sign * logits[i])[::-1][:6]
            np.testing.assert_allclose(found, expected, atol=tolerance)
            np.testing.assert_allclose(logits[i][tokens], expected, atol=tolerance)
            assert (np.diff(sign * found) <= 0).all()
            assert len(set(tokens.tolist())) == 6


def test_logit_lens_is_for_sites_that_write_to_the_residual_stream(model_folder):
    model = resolve_model(str(model_folder))
    W_dec = torch.eye(32)
    assert logit_lens(model, "mlp_act.1", W_dec, 5, 400) is None
    assert logit_lens(model, "mlp_out.1", torch.ones(4, 16), 5, 400) is None  # no such width
    everything = logit_lens(model, "mlp_out.1", W_dec, 1000, 300)
    assert everything.top.shape == (32, 300)  # no more tokens than there are
    assert (np.sort(everything.top, axis=1) == np.arange(300)).all()
