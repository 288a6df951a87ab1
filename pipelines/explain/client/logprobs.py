"""Distributions over choices in the answer of an endpoint that repeats the prompt.

`/completions` with `echo` and `logprobs` lists, for each token of the prompt and for the one that
follows, its text, its offset in characters, and the most likely tokens at its place. A token is
known by its text: a choice has to be one token as a whole.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from sae_harvest.pipelines.explain.client.interface import Failure, Reading

NONE = Failure("no log-probabilities")


def probabilities(reading: Reading, answer: dict[str, Any]) -> npt.NDArray[np.float64] | Failure:
    """Return the distribution over the choices at each place, float64 [places, choices]."""
    prompt = reading.prefix + reading.text
    try:
        choice = answer["choices"][0]
        echo, logprobs = choice["text"], choice["logprobs"]
        tokens, offsets = logprobs["tokens"], logprobs["text_offset"]
        top = logprobs["top_logprobs"]
        same = len(tokens) == len(offsets) == len(top) > 0
        whole = all(isinstance(offset, int) for offset in offsets)
    except (LookupError, TypeError):
        return NONE
    if not isinstance(echo, str) or not echo.startswith(prompt):
        return Failure("another echo")
    if not (same and whole):
        return NONE
    first: dict[int, int] = {}  # entry by offset in the prompt
    begin = _begin(prompt, tokens, offsets)
    for number, offset in enumerate(offsets):
        first.setdefault(offset - begin, number)
    found = []
    for slot in reading.slots:
        place = len(reading.prefix) + slot
        if place not in first:
            listed = max(first) >= len(prompt)
            return Failure("no token limit at the place") if listed else NONE
        row = _distribution(top[first[place]], reading.choices)
        if isinstance(row, Failure):
            return row
        found.append(row)
    return np.array(found, np.float64).reshape(len(found), len(reading.choices))


def _begin(prompt: str, tokens: Sequence[Any], offsets: Sequence[int]) -> int:
    """Return the offset at which the prompt begins.

    Some servers, such as vLLM, list the token for the beginning of a text as if it were text.
    """
    special = isinstance(tokens[0], str) and tokens[0] and not prompt.startswith(tokens[0])
    return offsets[1] if special and len(offsets) > 1 and offsets[1] == len(tokens[0]) else 0


def _distribution(top: Any, choices: Sequence[str]) -> list[float] | Failure:
    """Return the softmax of log-probabilities over the choices; one that is not listed has 0."""
    if not isinstance(top, dict) or not top:
        return NONE
    values = [top.get(choice, -math.inf) for choice in choices]
    if not all(isinstance(value, int | float) and value < 1 for value in values):  # NaN, as well
        return NONE
    largest = max(values)
    if largest == -math.inf:
        return Failure("no choice among the log-probabilities")
    shares = [math.exp(value - largest) for value in values]
    return [share / sum(shares) for share in shares]
