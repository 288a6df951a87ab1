"""The settings of `train-sae eval`."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from sae_harvest.common.numbers import Count
from sae_harvest.common.settings import Option


class EvaluationSettings(BaseModel):
    """The sample sizes of an evaluation."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    rows: Annotated[Count, Option("Sample", "ROWS")] = Field(
        32_768, ge=1, description="held-out rows that are reconstructed, at most"
    )
    contexts: Annotated[Count, Option("Sample")] = Field(
        32, ge=1, description="held-out contexts on which the model runs with the SAE, at most"
    )
    ablated_rows: Annotated[Count, Option("Sample", "ROWS")] = Field(
        16, ge=1, description="held-out rows on which latents are ablated, at most"
    )
    n2g_latents: Annotated[Count, Option("Programs")] = Field(
        8, ge=0, description="latents, drawn at random, that get an N2G program; it asks the model"
    )
    probes: Annotated[bool, Option("Probes")] = Field(
        True, description="probe latents on packaged labelled texts, which the model reads first"
    )
    tasks: Annotated[str | None, Option("Probes", "PATH")] = Field(
        None,
        description="your own binary tasks on the evaluated store: a Parquet file with a column "
        "label and one of text, document, row, or a folder of such files; needs --features",
    )
    compute_table: Annotated[str | None, Option("Downstream loss", "TABLE")] = Field(
        None,
        description="table of compute and loss during pretraining: gpt2-124m, or a CSV file with "
        "the columns compute and loss; none: no compute-equivalent",
    )
