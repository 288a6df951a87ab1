"""The configuration of a feature build: one object for the command line and Python."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from sae_harvest.common.numbers import Count
from sae_harvest.common.settings import Option


class FeatureConfig(BaseModel):
    """The configuration of feature tables: contexts per latent, and their length.

    >>> FeatureConfig(n_top=40).window_tokens
    64
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    n_top: Annotated[Count, Option("Contexts", name="--top")] = Field(
        20, ge=1, le=1000, description="highest activations per latent, one per document"
    )
    n_decile: Annotated[Count, Option("Contexts", name="--decile")] = Field(
        2, ge=0, le=100, description="activations drawn from each tenth of a latent's firings"
    )
    n_random: Annotated[Count, Option("Contexts", name="--random")] = Field(
        10, ge=0, le=1000, description="activations drawn uniformly from all firings of a latent"
    )
    n_inactive: Annotated[Count, Option("Contexts", name="--silent")] = Field(
        10, ge=0, le=100, description="rows per latent without a firing in their window"
    )
    n_hard: Annotated[Count, Option("Contexts", name="--silent")] = Field(
        10, ge=0, le=100, description="such rows with a token or a firing neighbour of the latent"
    )
    window_tokens: Annotated[Count, Option("Contexts", "TOKENS", "--window")] = Field(
        64, ge=1, description="tokens shown around an activation, within its context"
    )
    n_neighbours: Count = Field(
        10, ge=1, le=100, description="nearest latents by decoder cosine, and by co-firing"
    )
    n_tokens: Count = Field(100, ge=1, description="most frequent tokens kept per latent")
    n_logits: Count = Field(20, ge=1, description="tokens at each end of the logit lens")
    seed: Annotated[Count, Option("Contexts")] = Field(
        0, ge=0, lt=2**62, description="seed of all random draws"
    )
    batch_rows: Count = Field(4096, ge=1, description="rows encoded at a time")
