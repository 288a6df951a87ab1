"""Revision: the explainer proposes texts, the model and the SAE read them, the phrase is rewritten.

The explainer has seen neither the set `validation` nor the set `test`. The revised explanation
takes the place of the first only if its simulation correlates more on `validation`; both are
scored on `test`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt

from sae_harvest.common.errors import InputError
from sae_harvest.pipelines.explain.client.interface import Generation, Text
from sae_harvest.pipelines.explain.prompts import Prompt
from sae_harvest.pipelines.explain.rendering import MARKED_SHARE, marked_text, numbered
from sae_harvest.pipelines.explain.writing import MAX_TOKENS, TEMPERATURE
from sae_harvest.pipelines.live import LiveModel
from sae_harvest.pipelines.source import NOTHING_MOVED, Locations

PROPOSED = 5  # texts of each kind
TEXT_TOKENS = 30  # of a proposed text, about
LEAST_SHARE = 0.05  # of the latent's largest activation, from which a token counts as active

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class Tried:
    """A proposed text, and what the latent did on it."""

    text: str
    """The text."""

    should_fire: bool
    """True if the explainer expected the latent to fire."""

    texts: Sequence[str]
    """Text of each token."""

    activations: Floats
    """Activation of the latent on each token [tokens]."""

    def marked(self, largest: float) -> str:
        """Return the text with marks around active tokens."""
        least = max(LEAST_SHARE * largest, MARKED_SHARE * float(self.activations.max(initial=0)))
        return marked_text(self.texts, self.activations >= least)


class Reads(Protocol):
    """A model with its SAE, or what stands in its place."""

    def activations_of(self, text: str, latent: int) -> tuple[Sequence[str], Floats]:
        """Return the text of each token, and the activation of a latent on it [tokens].

        Raises:
            InputError: the text has no tokens, or too many.
        """
        ...


class LiveReader:
    """The model and the SAE of feature tables."""

    def __init__(
        self, features: Path, device: str = "cpu", moved: Locations = NOTHING_MOVED
    ) -> None:
        """Load them; see `LiveModel.open` for arguments and errors."""
        self._live = LiveModel.open(features, device, moved)

    def activations_of(self, text: str, latent: int) -> tuple[Sequence[str], Floats]:
        """Return the text of each token, and the activation of a latent on it [tokens]."""
        found = self._live.activations(text)
        values = np.where(found.indices == latent, found.values, 0).sum(axis=1)
        return found.token_texts, values.astype(np.float32)


def proposal(prompt: Prompt, explanation: str, seed: int) -> Generation:
    """Ask for texts on which a latent should fire, and for similar ones on which it should not."""
    messages = prompt.messages({"explanation": explanation, "n": str(PROPOSED)})
    return Generation(messages, 2 * PROPOSED * TEXT_TOKENS, TEMPERATURE, seed)


def proposed(answer: Text) -> list[tuple[str, bool]]:
    """Return the texts in an answer, at most five of each kind, and whether the latent should fire.

    Lines without a sign in front are left out.
    """
    found: list[tuple[str, bool]] = []
    for line in answer.text.splitlines():
        match = re.match(r"\s*([+\-\u2212\u2013])\s*(\S.*)$", line)
        if match is None:
            continue
        pair = match[2].strip().strip('"'), match[1] == "+"
        if pair[0] and pair not in found and sum(p[1] == pair[1] for p in found) < PROPOSED:
            found.append(pair)
    return found


def tried(reader: Reads, latent: int, texts: Sequence[tuple[str, bool]]) -> list[Tried]:
    """Read proposed texts; those that the model cannot read are left out."""
    found = []
    for text, should_fire in texts:
        try:
            found.append(Tried(text, should_fire, *reader.activations_of(text, latent)))
        except InputError:  # no tokens, or more than fit into a context
            continue
    return found


def revision(
    prompt: Prompt, explanation: str, seen: Sequence[Tried], largest: float, seed: int
) -> Generation:
    """Ask for the explanation again, in view of the tried texts."""
    texts = numbered(one.marked(largest) for one in seen)
    messages = prompt.messages({"explanation": explanation, "tried": texts})
    return Generation(messages, MAX_TOKENS, 0.0, seed)
