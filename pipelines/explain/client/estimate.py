"""The tokens and the price of requests, before they are sent."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from sae_harvest.pipelines.explain.client.interface import Generation, Request

CHARS_PER_TOKEN = 4  # of English text, about
NEW_PER_READING = 1  # endpoints generate at least one token


@dataclass(frozen=True, slots=True)
class Prices:
    """Prices of an endpoint."""

    prompt: float
    """Price of a million tokens that are read, in the user's currency."""

    new: float
    """Price of a million tokens that are generated."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """Sums over requests."""

    generations: int = 0
    """Number of requests for new text."""

    readings: int = 0
    """Number of requests for distributions."""

    prompt_tokens: int = 0
    """Tokens that are read; a shared prefix counts each time, as endpoints charge it."""

    new_tokens: int = 0
    """Tokens that are generated, at most."""

    exact: bool = True
    """True if `prompt_tokens` comes from a tokenizer, and not from the number of characters."""

    def __add__(self, other: Estimate) -> Estimate:
        """Return the sums over both."""
        return Estimate(
            self.generations + other.generations,
            self.readings + other.readings,
            self.prompt_tokens + other.prompt_tokens,
            self.new_tokens + other.new_tokens,
            self.exact and other.exact,
        )

    def cost(self, prices: Prices) -> float:
        """Return the price, at most."""
        return (self.prompt_tokens * prices.prompt + self.new_tokens * prices.new) / 1e6

    def __str__(self) -> str:
        how = "by the tokenizer" if self.exact else f"{CHARS_PER_TOKEN} characters to a token"
        return (
            f"{self.generations:,} generations and {self.readings:,} readings: "
            f"{self.prompt_tokens:,} tokens to read ({how}), and at most {self.new_tokens:,} new."
        )


def estimate(
    requests: Iterable[Request], n_tokens: Callable[[Request], int] | None = None
) -> Estimate:
    """Estimate the tokens of requests.

    Args:
        requests: the requests.
        n_tokens: counts the tokens that a model reads, as `LocalClient.n_tokens`; None to divide
            characters by 4.
    """
    generations = readings = prompt = new = 0
    for request in requests:
        if isinstance(request, Generation):
            generations += 1
            new += request.max_tokens
        else:
            readings += 1
            new += NEW_PER_READING
        prompt += n_tokens(request) if n_tokens else -(-_n_chars(request) // CHARS_PER_TOKEN)
    return Estimate(generations, readings, prompt, new, exact=n_tokens is not None)


def _n_chars(request: Request) -> int:
    if isinstance(request, Generation):
        return sum(len(message.text) for message in request.messages)
    return len(request.prefix) + len(request.text)
