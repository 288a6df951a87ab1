"""What a feature build is asked for: one object for the command line and Python."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field


class FeatureConfig(BaseModel):
    """How many contexts per latent, and how long."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    n_top: int = Field(
        default=20, ge=1, le=1000, description="highest activations kept, one per document"
    )
    n_random: int = Field(
        default=10, ge=0, le=1000, description="activations drawn uniformly from all firings"
    )
    window_tokens: int = Field(
        default=64, ge=1, description="tokens shown around the peak, within its context"
    )
    n_neighbours: int = Field(
        default=10, ge=1, le=100, description="nearest latents by cosine of decoder rows"
    )
    n_tokens: int = Field(default=10, ge=1, description="most frequent tokens kept per latent")
    n_logits: int = Field(default=20, ge=1, description="tokens at either end of the logit lens")
    seed: int = Field(default=0, ge=0, description="of the random stratum")
    batch_rows: int = Field(default=4096, ge=1, description="rows encoded at a time")
