"""Readings put to any client: one that returns no log-probabilities is asked in words.

In words, a question mark stands for each place, and the answer is parsed: the choice gets the
probability 1. An answer of another form is a failure.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Sequence

import numpy as np

from sae_harvest.pipelines.explain.client.interface import (
    Client,
    Failure,
    Generation,
    Message,
    OnAnswer,
    Read,
    Reading,
    Text,
    Usage,
    unheard,
)

TOKENS_PER_CHOICE = 3  # of an answer, at most


def read(
    client: Client,
    readings: Sequence[Reading],
    on_answer: OnAnswer = unheard,
) -> list[Read | Failure]:
    """Answer readings by log-probabilities, or in words where the client returns none."""
    if client.reads:
        return client.read(readings, on_answer)
    answers = client.generate([in_words(reading) for reading in readings], on_answer)
    return [
        answer if isinstance(answer, Failure) else parsed(answer, reading)
        for reading, answer in zip(readings, answers, strict=True)
    ]


def in_words(reading: Reading) -> Generation:
    """Return the question of a reading in words."""
    names = [choice.strip() for choice in reading.choices]
    n = len(reading.slots)
    if n == 1 and reading.slots[0] == len(reading.text):
        order = f"Answer with one of: {', '.join(names)}. Answer with nothing else."
    else:
        order = (
            f"Each question mark after a tab in the last part stands for one of: "
            f"{', '.join(names)}. There are {n}. Answer with these {n} in their order, separated "
            "by spaces, and nothing else."
        )
    text = f"{reading.prefix}{reading.text}\n\n{order}"
    return Generation((Message("user", text),), TOKENS_PER_CHOICE * n + 8)


def parsed(answer: Text, reading: Reading) -> Read | Failure:
    """Return the choices that an answer in words names; a failure if it is of another form."""
    names = {choice.strip(): number for number, choice in enumerate(reading.choices)}
    words = re.findall(r"\w+", answer.text)
    if len(words) != len(reading.slots):
        return Failure("an answer with another number of words")
    if not set(words) <= set(names):
        return Failure("an answer with other words")
    probability = np.zeros((len(words), len(names)))
    probability[np.arange(len(words)), [names[word] for word in words]] = 1
    return Read(probability, Usage(answer.usage.prompt_tokens, answer.usage.new_tokens))


def counted(progress: Callable[[int, int], None], total: int) -> OnAnswer:
    """Return a function that counts answers, and calls `progress` with their number."""
    numbers = itertools.count(1)
    if total:
        progress(0, total)
    return lambda number, answer: progress(next(numbers), total)
