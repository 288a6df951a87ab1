"""A run without a model: what would be asked, counted."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from sae_harvest.pipelines.explain.client.estimate import Estimate, estimate
from sae_harvest.pipelines.explain.client.interface import (
    Failure,
    Generation,
    OnAnswer,
    Read,
    Reading,
    Request,
    Tally,
    Text,
    Usage,
    unheard,
)

PLACEHOLDER = "a phrase of about as many words as an explanation has, {}"


class DryClient:
    """Answers every request by a placeholder, and counts what the model would read and write."""

    identity = "dry run"

    def __init__(self, reads: bool, n_tokens: Callable[[Request], int] | None) -> None:
        """`reads`, `n_tokens`: as the client that would be asked; see `estimate`."""
        self.reads, self._n_tokens = reads, n_tokens
        self.tally, self.estimate = Tally(), Estimate()

    def generate(
        self, requests: Sequence[Generation], on_answer: OnAnswer = unheard
    ) -> list[Text | Failure]:
        """Return a phrase for each request; those of one latent differ."""
        self.estimate += estimate(requests, self._n_tokens)
        found: list[Text | Failure] = []
        for number, request in enumerate(requests):
            found.append(Text(PLACEHOLDER.format(request.seed), Usage(0, 0)))
            on_answer(number, found[-1])
        return found

    def read(
        self, requests: Sequence[Reading], on_answer: OnAnswer = unheard
    ) -> list[Read | Failure]:
        """Return equal probabilities for each request."""
        self.estimate += estimate(requests, self._n_tokens)
        found: list[Read | Failure] = []
        for number, request in enumerate(requests):
            n = len(request.choices)
            even = np.full((len(request.slots), n), 1 / n)
            found.append(Read(even, Usage(0, 0)))
            on_answer(number, found[-1])
        return found
