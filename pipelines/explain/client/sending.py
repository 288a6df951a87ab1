"""Requests over HTTP, which are repeated where that may help, within limits of rate and tokens.

The key is read from the environment for each request. It is kept nowhere, and taken out of whatever
a server says.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import time
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any

import httpx2

from sae_harvest.common.errors import InputError
from sae_harvest.common.masking import MASK
from sae_harvest.pipelines.explain.client.interface import Failure, Tally, Usage
from sae_harvest.pipelines.explain.client.settings import EndpointSettings

AGAIN = (408, 409, 425, 429)  # and all from 500 on
LONGEST_WAIT = 300.0  # seconds between two attempts, at most
SAID = 200  # characters of what a server says that are shown
SECRET = 8  # characters of a key from which on it is taken out of texts; `EMPTY` is no secret


class Sending:
    """Sends requests to an endpoint. An asynchronous context manager."""

    def __init__(self, settings: EndpointSettings, tally: Tally, backoff_seconds: float) -> None:
        """Take the settings, the tally to count in, and the time before the second attempt."""
        self._settings, self._tally, self._backoff = settings, tally, backoff_seconds
        self._turn = 0.0  # when the next attempt may begin

    async def __aenter__(self) -> Sending:
        limits = httpx2.Limits(max_connections=self._settings.concurrency)
        self._http = httpx2.AsyncClient(timeout=None, limits=limits)
        return self

    async def __aexit__(self, *error: object) -> None:
        await self._http.aclose()

    async def post(self, path: str, body: dict[str, Any]) -> dict[str, Any] | Failure:
        """Send a request; return the answer, with its tokens counted.

        Raises:
            InputError: the endpoint does not take the key, or has no such address.
        """
        budget = self._settings.budget_tokens
        if budget is not None and self._tally.prompt_tokens + self._tally.new_tokens >= budget:
            return Failure("budget")
        attempt = 0
        while True:
            await self._wait_for_turn()
            self._tally.asked += 1
            answer, wait = await self._attempt(f"{self._settings.base_url}{path}", body)
            attempt += 1
            if wait is None or attempt == self._settings.attempts:
                break
            backoff = self._backoff * 2.0 ** (attempt - 1) * random.uniform(1, 1.5)
            await asyncio.sleep(min(max(wait, backoff), LONGEST_WAIT))
        if isinstance(answer, dict):
            self._tally.used(usage(answer, body))
        return answer

    async def _attempt(
        self, url: str, body: dict[str, Any]
    ) -> tuple[dict[str, Any] | Failure, float | None]:
        """Return an answer, and the seconds that the server asks to wait; None if it is final."""
        try:
            async with asyncio.timeout(self._settings.timeout_seconds):
                response = await self._http.post(url, json=body, headers=self._headers())
        except (TimeoutError, httpx2.TimeoutException):
            return Failure("timeout"), 0
        except httpx2.ConnectError:
            return Failure("no connection"), 0
        except httpx2.RequestError:
            return Failure("broken connection"), 0
        status = response.status_code
        if status in (401, 403, 404):
            raise self._refused(url, status, self._said(response))
        if status in AGAIN or status >= 500:
            return Failure(f"HTTP {status}"), _retry_after(response)
        if not response.is_success:
            return Failure(f"HTTP {status}: {self._said(response)}"), None
        try:
            answer = response.json()
        except (ValueError, RecursionError):
            return Failure("malformed JSON"), 0
        return (answer, None) if isinstance(answer, dict) else (Failure("malformed JSON"), 0)

    async def _wait_for_turn(self) -> None:
        if self._settings.requests_per_minute is not None:
            self._turn = max(self._turn, time.monotonic())
            wait = self._turn - time.monotonic()
            self._turn += 60 / self._settings.requests_per_minute
            await asyncio.sleep(wait)

    def _refused(self, url: str, status: int, said: str) -> InputError:
        name = self._settings.key_variable
        if status == 404:
            completions = self._settings.api == "completions" and url.endswith("/completions")
            other = ", or use --api chat if the endpoint has no completions" * completions
            return InputError(
                f"The endpoint has no {url} (HTTP 404{said and ': '}{said}); correct the address "
                f"or the name of the model{other}."
            )
        if not self._key():
            return InputError(
                f"The endpoint {url} asks for a key (HTTP {status}); put it into the environment "
                f"variable {name}."
            )
        return InputError(
            f"The endpoint {url} does not accept the key (HTTP {status}); put a valid one into the "
            f"environment variable {name}."
        )

    def _key(self) -> str:
        name = self._settings.key_variable
        key = os.environ.get(name, "").strip()
        if not all("!" <= character <= "~" for character in key):
            raise InputError(
                f"The environment variable {name} holds spaces or other characters that no key "
                "has; put the key alone into it."
            )
        return key

    def _headers(self) -> dict[str, str]:
        key = self._key()
        return {"Authorization": f"Bearer {key}"} if key else {}

    def scrubbed(self, text: str) -> str:
        """Return a text of the server without the key, and without halves of characters."""
        key, text = self._key(), text.encode(errors="replace").decode()
        return text.replace(key, MASK) if len(key) >= SECRET else text

    def _said(self, response: httpx2.Response) -> str:
        """Return the server's own sentence about an error, in one line."""
        said: Any = response.text
        with contextlib.suppress(ValueError, RecursionError):
            said = response.json()
            for name in ("error", "message"):
                said = said[name] if isinstance(said, dict) and name in said else said
        return " ".join(self.scrubbed(str(said)).split())[:SAID].rstrip(".")


def usage(answer: dict[str, Any], body: dict[str, Any]) -> Usage:
    """Return the tokens of a request, estimated where the server does not say them."""
    told = answer.get("usage")
    told = told if isinstance(told, dict) else {}
    prompt, new = told.get("prompt_tokens"), told.get("completion_tokens")
    estimate = len(str(body.get("messages", body.get("prompt")))) // 4
    return Usage(
        prompt if isinstance(prompt, int) and prompt >= 0 else estimate,
        new if isinstance(new, int) and new >= 0 else body["max_tokens"],
    )


def _retry_after(response: httpx2.Response) -> float:
    """Return the seconds of the header Retry-After, a number or a date; 0 without it."""
    value = response.headers.get("retry-after", "")
    try:
        seconds = float(value)
    except ValueError:
        try:
            date = parsedate_to_datetime(value)
        except ValueError:
            return 0
        date = date if date.tzinfo else date.replace(tzinfo=UTC)
        seconds = (date - datetime.now(UTC)).total_seconds()
    return seconds if 0 < seconds < float("inf") else 0
