"""Live text and steering for the pages: limited in size, one request at a time."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from sae_harvest.common.errors import InputError, SaeHarvestError
from sae_harvest.pipelines.live import LiveModel
from sae_harvest.pipelines.steer import Clamp, generate
from sae_harvest.pipelines.viewer.tables import Tables, plain
from sae_harvest.pipelines.viewer.unusual import Unusual

MAX_TEXT_CHARS = 5_000  # characters of a text or prompt
MAX_TOKENS = 200  # generated tokens
MAX_CLAMPS = 8
PER_TOKEN = 64  # latents listed per token


class BusyError(SaeHarvestError):
    """The model, or the SQL worker, is busy with another request."""


class Models:
    """The model that the tables were made with, loaded at the first request.

    Args:
        open_model: loads the model; raises `SaeHarvestError` with the reason if it cannot.
    """

    def __init__(self, tables: Tables, open_model: Callable[[], LiveModel]) -> None:
        self._tables, self._open = tables, open_model
        self._model: LiveModel | None = None
        self._turn = threading.Lock()

    def activations(self, text: str) -> dict[str, Any]:
        """Return the latents that fire on each token of a text, the most unusual first.

        Each token has `latents`, a list of [latent, activation, unusualness]; `labels` describes
        the latents.

        Raises:
            InputError: the text is empty or too long.
            BusyError: the model is busy with another request.
        """
        with self._taken() as model:
            live = model.activations(check_text(text, "text"))
        indices, values = live.indices, live.values
        found = np.unique(indices[values > 0]).tolist()
        unusual = Unusual(self._tables, found)
        tokens = []
        for at, shown in enumerate(live.token_texts):
            firing = [
                [int(latent), plain(float(value)), plain(unusual(int(latent), float(value)))]
                for latent, value in zip(indices[at], values[at], strict=True)
                if value > 0
            ]
            firing.sort(key=lambda f: (-f[2], -f[1], f[0]))
            tokens.append({"text": shown, "latents": firing[:PER_TOKEN]})
        shown_latents = sorted({latent for token in tokens for latent, _, _ in token["latents"]})
        return {
            "tokens": tokens,
            "n_firing": int((values > 0).sum()),
            "labels": {str(k): v for k, v in self._tables.labels(shown_latents).items()},
        }

    def generate(
        self,
        prompt: str,
        clamps: Sequence[Clamp],
        n_tokens: int,
        temperature: float,
        seed: int,
        on_token: Callable[[str], bool] | None = None,
    ) -> dict[str, Any]:
        """Continue a prompt with latents clamped, within the limits of this module.

        Raises:
            InputError: an argument exceeds a limit.
            BusyError: the model is busy with another request.
        """
        if not 1 <= n_tokens <= MAX_TOKENS:
            raise InputError(f"Ask for 1 to {MAX_TOKENS} tokens, not {n_tokens}.")
        if len(clamps) > MAX_CLAMPS:
            raise InputError(f"Clamp at most {MAX_CLAMPS} latents, not {len(clamps)}.")
        if not 0 <= temperature <= 5:
            raise InputError(f"The temperature must be from 0 to 5, not {temperature:g}.")
        for clamp in clamps:
            self._tables.check(clamp.latent)
        with self._taken() as model:
            made = generate(
                model, check_text(prompt, "prompt"), clamps, n_tokens, temperature, seed, on_token
            )
        return {"text": made.text, "token_texts": made.token_texts, "done": True}

    @contextmanager
    def _taken(self) -> Iterator[LiveModel]:
        if not self._turn.acquire(blocking=False):
            raise BusyError("The model is busy with another text; try again in a moment.")
        try:
            if self._model is None:
                self._model = self._open()
            yield self._model
        finally:
            self._turn.release()


def check_text(text: str, what: str) -> str:
    """Return the text; raise `InputError` if it is empty or too long."""
    if not text.strip():
        raise InputError(f"Type a {what}.")
    if len(text) > MAX_TEXT_CHARS:
        raise InputError(f"The {what} has {len(text):,} characters; at most {MAX_TEXT_CHARS:,}.")
    return text
