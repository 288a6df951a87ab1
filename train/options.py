"""The settings of a training run: from options and a YAML file to a configuration."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from sae_harvest.common.options import Place
from sae_harvest.common.settings import CommandSettings, Device, Option
from sae_harvest.train.config import READERS, TrainConfig

# defaults of required settings; k only if the activation function has one
DEFAULTS: dict[str, Any] = {"n_latents": 8192, "k": 32, "tokens": 10_000_000}


class Places(BaseModel):
    """Where a run reads, writes and computes."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    store: Annotated[Place, Option("Places", "PLACE")] = Field(
        description="activation store: a folder, or s3://bucket/prefix"
    )
    out: Annotated[Place, Option("Places", "FOLDER")] = Field(
        description="folder of the run; the same command continues an existing run"
    )
    site: Annotated[str | None, Option("Places")] = Field(
        None, description="site to train on, such as resid_post.12; none: the store's only one"
    )
    device: Device = "auto"


class RunSettings(CommandSettings):
    """The settings of `train-sae run`, and of the members of a sweep."""

    models = (Places, TrainConfig)

    def places(self) -> Places:
        """Return where to read, write and compute. Raise `click.UsageError` for a bad value."""
        return self.read(Places)

    def config(self) -> TrainConfig:
        """Return the configuration, with DEFAULTS. Raise `click.UsageError` for a bad value."""
        reads_k = self.values(TrainConfig).get("activation", "topk") in READERS["k"]
        return self.read(
            TrainConfig, {key: DEFAULTS[key] for key in DEFAULTS if key != "k" or reads_k}
        )
