"""Texts and a tokenizer made on the spot, and the shards they become."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

from tokenizers import ByteLevelBPETokenizer
from transformers import PreTrainedTokenizerFast

from sae_harvest.harvest.text.documents import Corpus, CorpusSpec, Cursor, Document
from sae_harvest.harvest.tokens.contexts import iter_shards
from sae_harvest.store.writer import Shard

LENGTH = 16
LONG = 60  # number of the document that is longer than a window
END = "<|endoftext|>"
WORDS = ["the", "cat", "sat", "on", "a", "mat", "—", "café", "menus", "in", "東京", "🤯", "naïve"]
WORDS += [END, "don't\n\nstop"]


class Texts(Corpus):
    """Documents made from a list of texts; `read` has the numbers of those read, in order."""

    cursor_names = ("next",)

    def __init__(self, texts: list[str], dedup: bool = False) -> None:
        super().__init__(CorpusSpec(name="texts", dedup=dedup))
        self._texts = texts
        self.read: list[int] = []

    def fingerprint(self) -> str:
        return "texts"

    def require_unchanged(self) -> None:
        pass

    def _read(self, cursor: Cursor | None) -> Iterator[tuple[Document, Cursor]]:
        for number in range(cursor["next"] if cursor else 0, len(self._texts)):
            self.read.append(number)
            url = f"https://a.example/{number}"
            document = Document(f"id-{number}", "texts", None, url, self._texts[number])
            yield document, {"next": number + 1}


def random_texts(count: int, seed: int = 0) -> list[str]:
    rng = random.Random(seed)
    return [" ".join(rng.choices(WORDS, k=rng.randint(1, 60))) for _ in range(count)]


def varied_texts() -> list[str]:
    """101 short texts and one that is longer than a window of 64 contexts."""
    long = " ".join(f"{number} {WORDS[number % 13]}" for number in range(900))
    return [*random_texts(LONG), long, "x", *random_texts(40, seed=1)]


def make_tokenizer(**special: str) -> PreTrainedTokenizerFast:
    bpe = ByteLevelBPETokenizer(trim_offsets=True)
    known = [text.replace("🤯", "") for text in random_texts(50)]  # so it stays four byte tokens
    bpe.train_from_iterator(known, vocab_size=320, special_tokens=[END, "<s>"])
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe._tokenizer, **({"eos_token": END} | special)
    )


def plain_tokens(text: str, tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """Tokens of a text without marks, made by the tokenizer itself."""
    return tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]


def shards(
    texts: list[str] | Corpus,
    tokenizer: PreTrainedTokenizerFast,
    n_contexts: int = 300,
    **options: Any,
) -> list[Shard]:
    """Whole shards of these texts until there are `n_contexts`, which they must hold."""
    given: dict[str, Any] = {
        "bos": "none",
        "seed": 3,
        "contexts_per_shard": 20,
        "window_contexts": 64,
        "at_least": n_contexts,
    } | options
    given.setdefault("n_shards", -(-n_contexts // given["contexts_per_shard"]))
    corpus = texts if isinstance(texts, Corpus) else Texts(texts)
    return list(iter_shards(corpus, tokenizer, LENGTH, **given))
