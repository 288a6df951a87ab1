"""Windows: the stream of tokens cut to contexts, with their pieces, and shuffled."""

from __future__ import annotations

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from sae_harvest.harvest.tokens import encoding
from sae_harvest.harvest.tokens.encoding import StreamCursor
from sae_harvest.harvest.tokens.windows import iter_windows
from tests.made_texts import (
    LENGTH,
    Texts,
    make_tokenizer,
    plain_tokens,
    varied_texts,
)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer(bos_token="<s>")


@pytest.fixture(scope="module")
def texts() -> list[str]:
    return varied_texts()


def test_character_spans_worked_by_hand() -> None:
    tokenizer = make_tokenizer()
    text = "xzxzxz🤯q"
    assert len(plain_tokens(text, tokenizer)) == 6 + 4 + 1  # the emoji is four tokens of a byte
    window = next(iter_windows(Texts([text, text]), tokenizer, 8, "none", 0))
    names = ("document", "first_token", "char_start", "char_end")
    found = sorted(zip(*(window.pieces[name].tolist() for name in names), strict=True))
    assert found == [
        (0, 0, 0, 7),  # six letters and half of the emoji
        (0, 8, 6, 8),  # the other half, q, end of text
        (1, 0, 0, 4),  # xzxz
        (1, 4, 4, 8),  # xz, the emoji, q, end of text
    ]


def test_windows_across_batches_worked_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoding, "BATCH_DOCUMENTS", 1)
    tokenizer = make_tokenizer()
    corpus = Texts(["xzxz", "xzxzxz", "x"])  # a token a letter; from tokens 0, 5 and 12 of 14
    windows = list(iter_windows(corpus, tokenizer, 4, "none", 0, window_contexts=1))
    names = ("context", "start", "stop", "document", "first_token", "char_start", "char_end")
    pieces = [list(zip(*(w.pieces[name].tolist() for name in names), strict=True)) for w in windows]
    assert pieces == [
        [(0, 0, 4, 0, 0, 0, 4)],
        [(1, 0, 1, 0, 4, 4, 4), (1, 1, 4, 1, 0, 0, 3)],
        [(2, 0, 4, 1, 3, 3, 6)],
    ]
    assert [window.documents["document"].tolist() for window in windows] == [[0], [1], []]
    second_batch = StreamCursor(corpus={"next": 1}, document=1, token=5)
    assert [window.cursor for window in windows] == [StreamCursor(), StreamCursor(), second_batch]
    (again,) = iter_windows(
        corpus, tokenizer, 4, "none", 0, window_contexts=1, first_window=2, cursor=second_batch
    )
    np.testing.assert_array_equal(again.tokens, windows[2].tokens)
    assert {name: column.tolist() for name, column in again.pieces.items()} == {
        name: column.tolist() for name, column in windows[2].pieces.items()
    }


def test_windows_are_shuffled_inside_and_kept_in_order(
    tokenizer: PreTrainedTokenizerFast, texts: list[str]
) -> None:
    stream = [t for x in texts for t in [*plain_tokens(x, tokenizer), tokenizer.eos_token_id]]
    n_contexts = len(stream) // LENGTH
    cut = np.array(stream[: n_contexts * LENGTH]).reshape(n_contexts, LENGTH)
    got = list(iter_windows(Texts(texts), tokenizer, LENGTH, "none", 3, 64))
    assert [window.pieces["context"][0] for window in got] == list(range(0, n_contexts, 64))
    assert len(got[-1].tokens) == n_contexts % 64  # the last window is partial, and shuffled too
    orders = []
    for window in got:
        first = window.pieces["context"][0]
        original = cut[first : first + 64]
        assert sorted(window.tokens.tolist()) == sorted(original.tolist())
        assert (window.tokens != original).any()
        orders.append([original.tolist().index(row) for row in window.tokens.tolist()])
    assert orders[0] != orders[1]
    other = next(iter_windows(Texts(texts), tokenizer, LENGTH, "none", 4, 64))
    assert (other.tokens != got[0].tokens).any()
