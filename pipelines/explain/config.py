"""The settings of `sae-features explain`."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from sae_harvest.common.numbers import Count
from sae_harvest.common.settings import Option


class ExplainConfig(BaseModel):
    """The settings of explanations and their scores.

    >>> ExplainConfig().candidates
    3
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    candidates: Annotated[Count, Option("Explanations")] = Field(
        3, ge=1, le=100, description="explanations written for each latent; one is chosen"
    )
    shown: Annotated[Count, Option("Explanations", "EXCERPTS")] = Field(
        10, ge=1, le=100, description="active excerpts that the explainer sees"
    )
    contrast: Annotated[Count, Option("Explanations", "EXCERPTS")] = Field(
        4, ge=0, le=100, description="silent excerpts that the explainer sees"
    )
    revisions: Annotated[Count, Option("Explanations")] = Field(
        0,
        ge=0,
        le=10,
        description="rounds in which the explainer proposes texts, model and SAE read them, and "
        "the explanation is revised",
    )
    scored: Annotated[Count, Option("Scores", "EXCERPTS")] = Field(
        5, ge=1, le=100, description="excerpts of each kind that a score is computed from"
    )
    excerpt_tokens: Annotated[Count, Option("Explanations", "TOKENS")] = Field(
        32, ge=2, le=1024, description="tokens of an excerpt, at most"
    )
    seed: Annotated[Count, Option("Explanations")] = Field(
        0, ge=0, lt=2**62, description="seed of drawn candidates and shuffled labels"
    )
