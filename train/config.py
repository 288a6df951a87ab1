"""The description of an SAE (`SAEConfig`) and of its training (`TrainConfig`)."""

from __future__ import annotations

from math import log2
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from sae_harvest.common.numbers import Count
from sae_harvest.common.settings import Option
from sae_harvest.store.rules import RowRule

Normalization = Literal["none", "scale", "unit_norm", "layer_norm"]
Activation = Literal["topk", "batchtopk", "jumprelu", "relu", "gated"]
Objective = Literal["topk", "batchtopk", "jumprelu", "relu_l1", "relu_kl", "gated"]

ROW_NORMALIZATIONS = ("unit_norm", "layer_norm")  # inverting them needs numbers of the row itself
MAX_LATENTS = 2**31 - 1  # latents are numbered in int32
MAX_WEIGHT = 1e9  # far above useful values, and safe in float32
Weight = Annotated[float, Field(le=MAX_WEIGHT)]
COUNTED = ("topk", "batchtopk")  # activation functions with a fixed number of latents

# The default falls as 1 / sqrt(n_latents) (Gao et al. 2024, fig. 3). The constant suits runs of a
# few million rows with warm-up, decay and AuxK: after 1.45 M rows of SmolLM2's layer 12, 4,608
# latents, 1e-3 leaves FVU 0.163 and 2e-3 0.154.
LR_AT_REFERENCE = 2e-3
LR_REFERENCE_LATENTS = 2**14
WIDENING = 4  # k of Multi-TopK over k, as in the paper
WARMUP_SHARE = 0.05  # of the tokens
DECAY_SHARE = 0.3  # of the steps
DEAD_AFTER_TOKENS = 10_000_000  # Gao et al. 2024; shorter runs have
DEAD_AFTER_SHARE = 0.1  # this share of the tokens, so that AuxK acts during the run
PENALTY_WARMUP_SHARE = (
    0.05  # share of the steps in which penalties grow from 0; otherwise they kill latents
)

# field → objectives that use it; with other objectives the field must have its default
READERS: dict[str, tuple[Objective, ...]] = {
    "k": ("topk", "batchtopk", "jumprelu", "relu_kl"),
    "multi_topk": ("topk",),
    "l1": ("relu_l1", "gated"),
    "kl": ("relu_kl",),
    "l0": ("jumprelu",),
    "bandwidth": ("jumprelu", "relu_kl"),
}


class SAEConfig(BaseModel):
    """The configuration of an SAE: shape, activation function, normalisation, origin.

    >>> SAEConfig(d_in=768, n_latents=16_384, k=32, site="resid_post.8").is_transcoder
    False
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    d_in: int = Field(
        ge=1, le=MAX_LATENTS, description="width of the activations read, in dimensions"
    )
    d_out: int | None = Field(
        None,
        ge=1,
        le=MAX_LATENTS,
        description="width of the activations that a transcoder predicts; none: the SAE "
        "reconstructs its input",
    )
    n_latents: int = Field(
        ge=1, le=MAX_LATENTS, description="number of latents; each is one row of the weights"
    )
    k: int | None = Field(
        None,
        ge=1,
        description="latents kept per row (topk) or per row on average (batchtopk), at most "
        "n_latents; none for the other activation functions",
    )
    activation: Activation = Field(
        "topk",
        description="topk: the k largest ReLU(pi) of a row; batchtopk, jumprelu: pi where it "
        "exceeds the latent's threshold; relu: ReLU(pi); gated: a magnitude where pi > 0",
    )
    site: str = Field(description="site of the activations in the model, such as resid_post.12")
    target_site: str | None = Field(
        None, description="site that a transcoder predicts; none: the SAE reconstructs its input"
    )
    normalization: Normalization = Field(
        "none",
        description="normalisation of inputs; none; scale: divided by input_scale; unit_norm: "
        "each row to norm sqrt(d_in); layer_norm: each row to mean 0, deviation 1",
    )
    input_scale: float = Field(1.0, gt=0, allow_inf_nan=False, description="divisor of the inputs")
    output_scale: float = Field(
        1.0,
        gt=0,
        allow_inf_nan=False,
        description="factor of a transcoder's predictions; reconstructions of an SAE are "
        "multiplied by input_scale",
    )

    rule: RowRule = Field(
        RowRule(),
        description="rows that it was trained on; the default for reading rows",
    )
    model: str = Field("", description="name of the model whose activations it was trained on")
    model_weights: str = Field(
        "", description="identity of the model's weights, as in the store's plan; empty: unknown"
    )

    @model_validator(mode="after")
    def _consistent(self) -> SAEConfig:
        if (self.k is not None) != (self.activation in COUNTED):
            needs = "needs a" if self.k is None else "has no"
            raise ValueError(f"activation {self.activation} {needs} k, got {self.k}")
        if self.k is not None and self.k > self.n_latents:
            raise ValueError(f"k must be at most n_latents, got {self.k} > {self.n_latents}")
        if (self.d_out is None) != (self.target_site is None):
            raise ValueError(
                "d_out and target_site belong to a transcoder and come together, got "
                f"{self.d_out} and {self.target_site}"
            )
        if self.normalization != "scale" and (self.input_scale, self.output_scale) != (1.0, 1.0):
            raise ValueError(
                f"normalization {self.normalization} needs input_scale and output_scale 1, got "
                f"{self.input_scale} and {self.output_scale}"
            )
        if not self.is_transcoder and self.output_scale != 1.0:
            raise ValueError(f"output_scale is only for transcoders, got {self.output_scale}")
        if self.is_transcoder and self.normalization in ROW_NORMALIZATIONS:
            raise ValueError(
                f"normalization {self.normalization} cannot be undone for another site; a "
                "transcoder takes none or scale"
            )
        return self

    @property
    def is_transcoder(self) -> bool:
        """Whether the SAE is a transcoder, which predicts another site than it reads."""
        return self.d_out is not None

    @property
    def width_out(self) -> int:
        """Width of reconstructions: `d_out`, or `d_in` if `d_out` is None."""
        return self.d_in if self.d_out is None else self.d_out


class TrainConfig(BaseModel):
    """The configuration of a training run. It is saved as `run.json` beside the SAE.

    >>> TrainConfig(n_latents=16_384, k=32, tokens=10_000_000).steps
    2441

    The loss is the squared error of the normalised rows over their total variance, plus
    penalties; see `train.step.objectives` for each formula.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    n_latents: Annotated[Count, Option("SAE")] = Field(
        ge=1, le=MAX_LATENTS, description="number of latents"
    )
    k: Annotated[Count | None, Option("SAE")] = Field(
        None,
        ge=1,
        description="active latents per row: exactly (topk), on average (batchtopk), aimed at "
        "(jumprelu, relu_kl); none for relu_l1 and gated, whose number follows from l1",
    )
    activation: Annotated[Objective, Option("SAE")] = Field(
        "topk", description="activation function, and the penalty it is trained with"
    )
    tokens: Annotated[Count, Option("Training", "ROWS")] = Field(
        ge=1, description="rows to train on, repeats included; whole batches"
    )
    batch_rows: Annotated[Count, Option("Training", "ROWS")] = Field(
        4096, ge=1, description="rows per step"
    )
    target_site: Annotated[str | None, Option("SAE")] = Field(
        None, description="site to predict, which makes a transcoder; none: reconstruct the input"
    )
    normalization: Annotated[Normalization, Option("SAE")] = Field(
        "scale",
        description="normalisation of inputs; scale: divided so that rows have mean variance 1 "
        "per dimension; unit_norm: each row to norm sqrt(d_in); layer_norm: each row to mean 0, "
        "deviation 1",
    )
    lr: Annotated[float | None, Option("Optimizer")] = Field(
        None,
        gt=0,
        le=1,
        description="learning rate of Adam; none: 2e-3 * sqrt(2^14 / n_latents)",
    )
    warmup_tokens: Annotated[Count | None, Option("Optimizer", "ROWS")] = Field(
        None,
        ge=0,
        description="rows over which the learning rate grows linearly from 0; none: 5 % of tokens",
    )
    decay_share: Annotated[float, Option("Optimizer", "SHARE")] = Field(
        DECAY_SHARE,
        ge=0,
        le=1,
        description="share of the steps, at the end, over which the learning rate falls "
        "linearly to 0",
    )
    adam_beta1: Annotated[float, Option("Optimizer")] = Field(
        0.9, ge=0, lt=1, description="decay of Adam's first moment, a step"
    )
    adam_beta2: Annotated[float, Option("Optimizer")] = Field(
        0.999, ge=0, lt=1, description="decay of the second moment, a step"
    )
    adam_eps: Annotated[Weight, Option("Optimizer")] = Field(
        6.25e-10, gt=0, description="constant added to Adam's denominator"
    )
    ema_decay: Annotated[float | None, Option("Optimizer")] = Field(
        0.999,
        ge=0,
        lt=1,
        description="share of the average of weights kept each step, at step t at most "
        "(1 + t) / (10 + t); none: the result is the last weights",
    )
    clip_norm: Annotated[Weight, Option("Optimizer")] = Field(
        1.0, gt=0, description="largest norm of the whole gradient"
    )
    auxk_alpha: Annotated[Weight, Option("Loss")] = Field(
        1 / 32, ge=0, description="weight of the AuxK loss; 0 leaves it out"
    )
    k_aux: Annotated[Count | None, Option("Loss", "LATENTS")] = Field(
        None,
        ge=1,
        description="dead latents that reconstruct a row's error; none: power of two near half "
        "of the width",
    )
    dead_after_tokens: Annotated[Count | None, Option("Loss", "ROWS")] = Field(
        None,
        ge=1,
        description="a latent is dead when it has not fired in this many rows; none: a tenth of "
        "tokens, at least batch_rows and at most 10,000,000",
    )
    multi_topk: Annotated[Weight, Option("SAE")] = Field(
        0.0,
        ge=0,
        description="weight of the loss at 4k latents (topk); 0: off, paper: 1/8",
    )
    matryoshka: Annotated[tuple[Count, ...], Option("SAE")] = Field(
        (),
        description="growing numbers of latents, the last n_latents: the loss is the mean over "
        "reconstructions from the first of them; empty: off",
    )
    l1: Annotated[Weight, Option("Loss")] = Field(
        0.1,
        ge=0,
        description="weight of a row's sum of activations over the square root of the total "
        "variance (relu_l1, gated)",
    )
    kl: Annotated[Weight, Option("Loss")] = Field(
        0.3,
        ge=0,
        description="weight of KL(k / n_latents || density), summed over latents, over k (relu_kl)",
    )
    l0: Annotated[Weight, Option("Loss")] = Field(
        1.0,
        ge=0,
        description="weight of (active latents per row / k - 1)^2 (jumprelu)",
    )
    bandwidth: Annotated[Weight, Option("Loss")] = Field(
        0.5,
        gt=0,
        description="width, in units of pre-activations, of the window around the threshold "
        "that gives it a gradient (jumprelu, relu_kl)",
    )
    seed: Annotated[Count, Option("Training")] = Field(
        0, ge=0, description="seed of the initial weights and of the order of rows"
    )
    order_seed: Annotated[Count | None, Option("Training")] = Field(
        None, ge=0, description="seed of the order of rows alone; none: seed"
    )
    rule: Annotated[RowRule, Option("Rows")] = Field(
        RowRule(), description="which rows to train on"
    )
    checkpoint_every: Annotated[Count, Option("Training", "STEPS")] = Field(
        200, ge=1, description="steps between checkpoints"
    )
    eval_rows: Annotated[Count, Option("Training", "ROWS")] = Field(
        262_144, ge=1, description="most held-out rows that evaluate the result"
    )

    @model_validator(mode="after")
    def _consistent(self) -> TrainConfig:
        for name, readers in READERS.items():
            default = type(self).model_fields[name].default
            if self.activation not in readers and getattr(self, name) != default:
                raise ValueError(
                    f"{name} is only for {', '.join(readers)}; leave it out with {self.activation}"
                )
        if self.k is None and self.activation in READERS["k"]:
            raise ValueError(f"activation {self.activation} needs k")
        if self.k is not None and self.k > self.n_latents:
            raise ValueError(f"k must be at most n_latents, got {self.k} > {self.n_latents}")
        if self.tokens < self.batch_rows:
            raise ValueError(
                f"tokens must be at least batch_rows, got {self.tokens} < {self.batch_rows}"
            )
        if self.warmup_tokens is not None and self.warmup_tokens > self.tokens:
            raise ValueError(
                "warmup_tokens must be at most tokens, or the learning rate is never reached, got "
                f"{self.warmup_tokens} > {self.tokens}"
            )
        if self.target_site is not None and self.normalization in ROW_NORMALIZATIONS:
            raise ValueError(
                f"normalization {self.normalization} cannot be undone for another site; with "
                "target_site use none or scale"
            )
        self._check_matryoshka()
        return self

    def _check_matryoshka(self) -> None:
        sizes = self.matryoshka
        if not sizes:
            return
        growing = all(a < b for a, b in zip((0, *sizes), sizes, strict=False))
        if not growing or sizes[-1] != self.n_latents:
            raise ValueError(
                f"matryoshka must grow from at least 1 to n_latents {self.n_latents}, got "
                f"{list(sizes)}"
            )
        if self.multi_topk > 0:
            raise ValueError("matryoshka and multi_topk are two ways to order latents; use one")

    @property
    def sae_activation(self) -> Activation:
        """The activation function without its penalty."""
        if self.activation in ("relu_l1", "relu_kl"):
            return "relu"
        return self.activation  # type: ignore[return-value]

    @property
    def wide_k(self) -> int:
        """Latents of each row in the wider of the two reconstructions of Multi-TopK."""
        return min(self.n_latents, WIDENING * (self.k or 0))

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

    def learning_rate_at(self, step: int) -> float:
        """Return the learning rate of the step after `step` steps: warm-up, constant, decay."""
        tokens = self.warmup_tokens
        if tokens is None:
            tokens = int(WARMUP_SHARE * self.tokens)
        warmup = -(-tokens // self.batch_rows)  # steps
        decay = round(self.decay_share * self.steps)  # steps
        factor = min(1.0, (step + 1) / (warmup + 1), (self.steps - step) / (decay + 1))
        return self.learning_rate * max(0.0, factor)

    @property
    def dead_after(self) -> int:
        """`dead_after_tokens`, or its default for this number of tokens."""
        if self.dead_after_tokens is not None:
            return self.dead_after_tokens
        return max(self.batch_rows, min(DEAD_AFTER_TOKENS, int(DEAD_AFTER_SHARE * self.tokens)))

    def penalty_factor_at(self, step: int) -> float:
        """Return the factor of l1, kl or l0 in the step after `step` steps."""
        return min(1.0, (step + 1) / (1 + PENALTY_WARMUP_SHARE * self.steps))

    def auxiliary_k(self, width: int) -> int:
        """Return `k_aux`, or the power of two nearest to width / 2 by ratio (ties: the larger)."""
        if self.k_aux is not None:
            return self.k_aux
        return max(1, 2 ** int(log2(max(1.0, width / 2)) + 0.5))
