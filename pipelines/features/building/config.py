"""The configuration of a feature build: one object for the command line and Python."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field


class FeatureConfig(BaseModel):
    """The configuration of feature tables: contexts per latent, and their length.

    >>> FeatureConfig(n_top=40).window_tokens
    64
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    n_top: int = Field(20, ge=1, le=1000, description="highest activations kept, one per document")
    n_decile: int = Field(
        2, ge=0, le=100, description="activations drawn from each tenth of a latent's firings"
    )
    n_random: int = Field(
        10, ge=0, le=1000, description="activations drawn uniformly from all firings"
    )
    n_inactive: int = Field(
        10, ge=0, le=100, description="rows in whose window the latent fires nowhere"
    )
    n_hard: int = Field(
        10, ge=0, le=100, description="such rows with a token or a neighbour of the latent"
    )
    window_tokens: int = Field(
        64, ge=1, description="tokens shown around the row, within its context"
    )
    n_neighbours: int = Field(
        10, ge=1, le=100, description="nearest latents by decoder cosine, and by firing together"
    )
    n_tokens: int = Field(100, ge=1, description="most frequent tokens kept per latent")
    n_logits: int = Field(20, ge=1, description="tokens at either end of the logit lens")
    seed: int = Field(0, ge=0, lt=2**62, description="of everything that is drawn")
    batch_rows: int = Field(4096, ge=1, description="rows encoded at a time")
