"""Models and texts that the benches make for themselves."""

from __future__ import annotations

import json
from collections.abc import Iterable
from itertools import cycle
from pathlib import Path

import numpy as np
import torch
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.utils import logging as transformers_logging

from sae_harvest.harvest.model.models import PACKAGED, load_tokenizer, resolve_model
from sae_harvest.harvest.text.corpus import CorpusSpec, open_corpus

CHARACTERS_PER_TOKEN = 5  # of the news; it has 4.64, so that there is a little more than enough


def gpt2_model(folder: Path, **shape: int) -> Path:
    """A GPT-2 with random weights and SmolLM2's tokenizer; 12 layers of 768, unless `shape` says.

    `shape` is of the fields of GPT2Config.
    """
    tokenizer = load_tokenizer(resolve_model(PACKAGED))
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=len(tokenizer),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        **shape,
    )
    transformers_logging.disable_progress_bar()
    GPT2LMHeadModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_news(file: Path) -> None:
    """The packaged news as JSON lines."""
    _write(file, _articles())


def write_long_news(file: Path, tokens: int) -> None:
    """At least so many tokens of news as JSON lines: article after article, again and again.

    The sentences of each are in another order every time, so that texts do not repeat.
    """
    articles = _articles()
    rng = np.random.default_rng(0)

    def texts() -> Iterable[str]:
        missing = tokens * CHARACTERS_PER_TOKEN
        for article in cycle(articles):
            if missing <= 0:
                return
            sentences = article.split(". ")
            rng.shuffle(sentences)
            missing -= len(article)
            yield ". ".join(sentences)

    _write(file, texts())


def _articles() -> list[str]:
    return [document.text for document in open_corpus(CorpusSpec(name="news")).documents()]


def _write(file: Path, texts: Iterable[str]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w", encoding="utf-8") as lines:
        lines.writelines(json.dumps({"text": text}) + "\n" for text in texts)
