"""Requests to a language model, and its answers, whoever runs it.

There are two kinds of requests. A **generation** continues a conversation by new text. A
**reading** takes a text and asks, at some places in it, which of a few continuations is likely
there; nothing is generated, so one forward pass answers all places.

A failed request is an answer like any other: a `Failure` with its reason. It is never replaced by a
made-up value, so that whoever asked can count it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import Literal, Protocol, TypeVar

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation."""

    role: Literal["system", "user", "assistant"]
    """Who says it."""

    text: str
    """The text that is said."""


@dataclass(frozen=True, slots=True)
class Generation:
    """A request for new text."""

    messages: tuple[Message, ...]
    """The conversation so far; the answer is the assistant's next turn."""

    max_tokens: int
    """Tokens of the answer, at most."""

    temperature: float = 0.0
    """0 takes the most likely token each time."""

    seed: int = 0
    """Seed of the draws, if the temperature is above 0."""


@dataclass(frozen=True, slots=True)
class Reading:
    """A request for the distribution over a few continuations at some places of a text."""

    prefix: str
    """Beginning of the text. Readings that follow one another with the same prefix share its
    computation."""

    text: str
    """The rest of the text."""

    slots: tuple[int, ...]
    """The places, in characters of `text`, ascending: before the character with this number; its
    length stands for the end. A place must be a limit of tokens."""

    choices: tuple[str, ...]
    """The continuations, such as the digits. Each counts by its first token, so these have to
    differ."""


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens of a request."""

    prompt_tokens: int
    """Tokens that were read."""

    new_tokens: int
    """Tokens that were generated."""


@dataclass(frozen=True, slots=True)
class Text:
    """The answer to a generation."""

    text: str
    """The new text, without spaces around it."""

    usage: Usage
    """Its tokens."""


@dataclass(frozen=True, slots=True, eq=False)
class Read:
    """The answer to a reading."""

    probability: npt.NDArray[np.float64]
    """Probability of each choice at each place, of the choices only: every row has the sum 1;
    float64 [slots, choices]."""

    usage: Usage
    """Its tokens."""


@dataclass(frozen=True, slots=True)
class Failure:
    """A request without an answer."""

    reason: str
    """The fault in a few words, such as `HTTP 429`, `timeout`, `no log-probabilities`.

    Details of the one request stand behind a colon.
    """

    @property
    def kind(self) -> str:
        """The reason without its details."""
        return self.reason.partition(":")[0]


@dataclass(slots=True)
class Tally:
    """Counts of all that a client has done so far."""

    asked: int = 0
    """Requests that were sent to the model; a repeated attempt counts again."""

    cached: int = 0
    """Requests that the cache answered."""

    prompt_tokens: int = 0
    """Tokens that the model read."""

    new_tokens: int = 0
    """Tokens that it generated."""

    failures: Counter[str] = field(default_factory=Counter)
    """Number of failed requests by the kind of their reason, after all attempts."""

    def used(self, usage: Usage) -> None:
        """Count tokens."""
        self.prompt_tokens += usage.prompt_tokens
        self.new_tokens += usage.new_tokens

    def failed(self, failure: Failure) -> None:
        """Count a failure."""
        self.failures[failure.kind] += 1


Request = Generation | Reading
Answer = Text | Read | Failure
A = TypeVar("A", bound=Answer)
Numbered = Generator[tuple[int, A], None, None]
OnAnswer = Callable[[int, Answer], None]  # number of a request, and its answer, when it is there


def unheard(number: int, answer: Answer) -> None:
    """Do nothing with an answer."""


def in_order(answers: Numbered[A], total: int, on_answer: OnAnswer) -> list[A]:
    """Return numbered answers in the order of their numbers; tell each as it comes."""
    found: dict[int, A] = {}
    with closing(answers):
        for number, answer in answers:
            found[number] = answer
            on_answer(number, answer)
    return [found[number] for number in range(total)]


class Client(Protocol):
    """A language model.

    `on_answer` is called for each request once, in any order, and in the thread of the caller.
    """

    tally: Tally
    """Counts of all that it has done so far."""

    @property
    def identity(self) -> str:
        """Return what decides the answers, beside the request: the model, and where it runs."""
        ...

    @property
    def reads(self) -> bool:
        """Return whether `read` is offered; some endpoints return no log-probabilities."""
        ...

    def generate(
        self, requests: Sequence[Generation], on_answer: OnAnswer = unheard
    ) -> list[Text | Failure]:
        """Answer generations, in their order."""
        ...

    def read(
        self, requests: Sequence[Reading], on_answer: OnAnswer = unheard
    ) -> list[Read | Failure]:
        """Answer readings, in their order.

        Raises:
            InputError: two choices begin with the same token.
        """
        ...
