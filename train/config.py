"""What a dictionary is (`SAEConfig`) and how one is trained (`TrainConfig`)."""

from __future__ import annotations

from math import log2
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from store.rules import RowRule

# Falls as 1 / sqrt(n_latents) (Gao et al. 2024, fig. 3). The constant suits runs of a few million
# rows: after 0.5 M rows of SmolLM2's layer 12, 16,384 latents, 4e-4 leaves FVU 0.36 and 1e-3 0.26.
LR_AT_REFERENCE = 1e-3
LR_REFERENCE_LATENTS = 2**14


class SAEConfig(BaseModel):
    """What is needed to use the weights: shape, activation function, input normalisation."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    d_in: int = Field(ge=1, description="width of the activations, in dimensions")
    n_latents: int = Field(ge=1, description="number of latents, one row of the weights each")
    k: int = Field(ge=1, description="latents kept per row, at most n_latents")
    activation: Literal["topk"] = Field(
        "topk", description="activation function: the k largest of ReLU(pre-activations)"
    )
    site: str = Field(description="where in the model the activations come from, resid_post.12 say")
    normalization: Literal["none", "scale"] = Field(
        "none", description="how inputs are normalised: not at all, or divided by input_scale"
    )
    input_scale: float = Field(
        1.0,
        gt=0,
        allow_inf_nan=False,
        description="number that inputs are divided by, and reconstructions multiplied",
    )

    rule: RowRule = Field(
        RowRule(), description="which rows it was trained on; what reads with it reads these"
    )
    model: str = Field("", description="name of the model whose activations it was trained on")
    model_weights: str = Field(
        "", description="identity of that model's weights, as in the store's plan; empty: unknown"
    )

    @model_validator(mode="after")
    def _consistent(self) -> SAEConfig:
        if self.k > self.n_latents:
            raise ValueError(f"k must be at most n_latents, got {self.k} > {self.n_latents}")
        if self.normalization == "none" and self.input_scale != 1.0:
            raise ValueError(f"normalization none has input_scale 1, got {self.input_scale}")
        return self


class TrainConfig(BaseModel):
    """One training run. Saved as `run.json` beside what it made."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    n_latents: int = Field(ge=1, description="number of latents")
    k: int = Field(ge=1, description="latents kept per row, at most n_latents")
    tokens: int = Field(ge=1, description="rows to train on, repeats included; whole batches")
    batch_rows: int = Field(4096, ge=1, description="rows per step")
    normalization: Literal["none", "scale"] = Field(
        "scale", description="scale: divide inputs so that rows have mean variance 1 per dimension"
    )
    lr: float | None = Field(
        None,
        gt=0,
        le=1,
        description="learning rate of Adam; none: 1e-3 * sqrt(2^14 / n_latents)",
    )
    adam_beta1: float = Field(0.9, ge=0, lt=1, description="decay of Adam's first moment, a step")
    adam_beta2: float = Field(0.999, ge=0, lt=1, description="decay of the second moment, a step")
    adam_eps: float = Field(6.25e-10, gt=0, description="added to Adam's denominator")
    ema_decay: float | None = Field(
        0.999,
        ge=0,
        lt=1,
        description="share of the average of weights kept each step, at step t at most "
        "(1 + t) / (10 + t); none: the result is the last weights",
    )
    clip_norm: float = Field(1.0, gt=0, description="largest norm of the whole gradient")
    auxk_alpha: float = Field(1 / 32, ge=0, description="weight of the AuxK loss; 0 leaves it out")
    k_aux: int | None = Field(
        None,
        ge=1,
        description="dead latents that reconstruct a row's error; none: power of two near d_in / 2",
    )
    dead_after_tokens: int = Field(
        10_000_000, ge=1, description="a latent is dead when it has not fired in this many rows"
    )
    seed: int = Field(0, ge=0, lt=2**63, description="of the initial weights and the order of rows")
    rule: RowRule = Field(RowRule(), description="which rows to train on")
    checkpoint_every: int = Field(200, ge=1, description="steps between checkpoints")
    eval_rows: int = Field(
        262_144, ge=1, description="held-out rows the result is evaluated on, at most"
    )

    @model_validator(mode="after")
    def _consistent(self) -> TrainConfig:
        if self.k > self.n_latents:
            raise ValueError(f"k must be at most n_latents, got {self.k} > {self.n_latents}")
        if self.tokens < self.batch_rows:
            raise ValueError(
                f"tokens must be at least batch_rows, got {self.tokens} < {self.batch_rows}"
            )
        return self

    @property
    def steps(self) -> int:
        """Whole batches in `tokens`."""
        return self.tokens // self.batch_rows

    @property
    def learning_rate(self) -> float:
        """`lr`, or its default for this number of latents."""
        if self.lr is not None:
            return self.lr
        return LR_AT_REFERENCE * float(LR_REFERENCE_LATENTS / self.n_latents) ** 0.5

    def auxiliary_k(self, d_in: int) -> int:
        """`k_aux`, or the power of two nearest to d_in / 2 (by ratio, the larger of equals)."""
        if self.k_aux is not None:
            return self.k_aux
        return max(1, 2 ** int(log2(max(1.0, d_in / 2)) + 0.5))
