"""A model behind any OpenAI-compatible endpoint.

New text comes from `/chat/completions`. Readings come from `/completions`, where the endpoint
repeats the prompt with log-probabilities; endpoints that only chat do not read.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from contextlib import closing
from typing import Any, TypeVar

from sae_harvest.common.errors import InputError
from sae_harvest.pipelines.explain.client.interface import (
    A,
    Failure,
    Generation,
    Numbered,
    OnAnswer,
    Read,
    Reading,
    Tally,
    Text,
    in_order,
    unheard,
)
from sae_harvest.pipelines.explain.client.logprobs import probabilities
from sae_harvest.pipelines.explain.client.parallel import in_parallel
from sae_harvest.pipelines.explain.client.sending import Sending, usage
from sae_harvest.pipelines.explain.client.settings import EndpointSettings

R = TypeVar("R")
BACKOFF_SECONDS = 1.0


class EndpointClient:
    """A language model that a server runs."""

    def __init__(
        self, settings: EndpointSettings, backoff_seconds: float = BACKOFF_SECONDS
    ) -> None:
        """Take the settings; nothing is sent yet.

        Args:
            settings: the address, the model and the limits.
            backoff_seconds: time before the second attempt at a request; it doubles each time.
        """
        self._settings = settings
        self.tally = Tally()
        self._sending = Sending(settings, self.tally, backoff_seconds)

    @property
    def identity(self) -> str:
        """The model and the address, and how many log-probabilities are asked for."""
        s = self._settings
        return f"{s.model} at {s.base_url}, {s.top_logprobs} log-probabilities"

    @property
    def reads(self) -> bool:
        """True if the endpoint returns log-probabilities of a prompt."""
        return self._settings.api == "completions"

    def generate(
        self, requests: Sequence[Generation], on_answer: OnAnswer = unheard
    ) -> list[Text | Failure]:
        """Answer generations, several at once.

        Raises:
            InputError: the endpoint does not take the key, or has no such address.
        """
        return in_order(self._answers(requests, self._generate), len(requests), on_answer)

    def read(
        self, requests: Sequence[Reading], on_answer: OnAnswer = unheard
    ) -> list[Read | Failure]:
        """Answer readings, several at once.

        Raises:
            InputError: the endpoint only chats, does not take the key, or has no such address.
        """
        if not self.reads:
            raise InputError(
                f"The endpoint {self._settings.base_url} returns no log-probabilities with --api "
                "chat; ask it in words."
            )
        return in_order(self._answers(requests, self._read), len(requests), on_answer)

    def _answers(self, requests: Sequence[R], ask: Callable[[R], Awaitable[A]]) -> Numbered[A]:
        running = in_parallel(requests, ask, self._settings.concurrency, self._sending)
        with closing(running) as answers:
            for number, answer in answers:
                if isinstance(answer, Failure):
                    self.tally.failed(answer)
                yield number, answer

    async def _generate(self, request: Generation) -> Text | Failure:
        body = {
            "model": self._settings.model,
            "messages": [{"role": m.role, "content": m.text} for m in request.messages],
            "max_tokens": request.max_tokens,
            "temperature": request.temperature,
            "seed": request.seed,
        }
        answer = await self._sending.post("/chat/completions", body)
        if isinstance(answer, Failure):
            return answer
        text = _content(answer)
        if text is None:
            return Failure("no text")
        return Text(self._sending.scrubbed(text).strip(), usage(answer, body))

    async def _read(self, request: Reading) -> Read | Failure:
        body = {
            "model": self._settings.model,
            "prompt": request.prefix + request.text,
            "max_tokens": 1,
            "temperature": 0,
            "echo": True,
            "logprobs": self._settings.top_logprobs,
        }
        answer = await self._sending.post("/completions", body)
        if isinstance(answer, Failure):
            return answer
        found = probabilities(request, answer)
        return found if isinstance(found, Failure) else Read(found, usage(answer, body))


def _content(answer: dict[str, Any]) -> str | None:
    """Return the text of an answer; None if there is none."""
    try:
        text = answer["choices"][0]["message"]["content"]
    except (LookupError, TypeError):
        return None
    return text if isinstance(text, str) else None
