"""The settings of `harvest plan` and `harvest run`: their options and their YAML file."""

from __future__ import annotations

from typing import Annotated, Any

import click
from pydantic import BaseModel, ConfigDict, Field

from sae_harvest.common.options import Place, grouped
from sae_harvest.common.settings import CommandSettings, Device, Option
from sae_harvest.harvest.run.config import HarvestConfig


class Places(BaseModel):
    """The place and the device of a harvest."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    store: Annotated[Place | None, Option("Store", "PLACE")] = Field(
        None, description="folder or s3://bucket/prefix to write; none: runs/MODEL-SITE/store"
    )
    device: Device = "auto"


layer_option = grouped(
    "Store",
    "--layer",
    type=int,
    multiple=True,
    help="Number N of a layer, for the site resid_post.N.",
)


class HarvestSettings(CommandSettings):
    """The settings of a harvest; `--layer` is short for a site."""

    models = (Places, HarvestConfig)

    @classmethod
    def typed(cls, ctx: click.Context) -> dict[str, Any]:
        found = super().typed(ctx)
        if layers := ctx.params["layer"]:
            named = (f"resid_post.{layer}" for layer in layers)
            found["sites"] = (*found.get("sites", ()), *named)
        return found

    def config(self) -> HarvestConfig:
        """Make the configuration. `click.UsageError` if no site is named, or a value is wrong."""
        if "sites" not in self.values(HarvestConfig):
            raise click.UsageError("Name what to record: --layer 8, or --site mlp_out.8.")
        return self.read(HarvestConfig)


def parse_shards(text: str | None) -> range | None:
    """Parse `4:8` as range(4, 8); a usage error for anything else."""
    if text is None:
        return None
    first, colon, last = text.partition(":")
    if not (colon and first.isdecimal() and last.isdecimal() and int(first) < int(last)):
        raise click.UsageError(f"--shards {text} is not FIRST:LAST, such as 0:100.")
    return range(int(first), int(last))
