"""The `sae-features` command: build, show, query, diff."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import click
from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from sae_harvest.common.console import Commands, output
from sae_harvest.common.numbers import CountRange
from sae_harvest.common.options import LocalPath, Place, grouped, name_or_path
from sae_harvest.common.paths import shown
from sae_harvest.common.settings import (
    CommandSettings,
    Device,
    Option,
    config_file_option,
    options_for,
)
from sae_harvest.pipelines.evaluate.programs.cli import programs
from sae_harvest.pipelines.explain.cli import explain
from sae_harvest.pipelines.explain.receipt_cli import receipt
from sae_harvest.pipelines.exports.cli import export_command
from sae_harvest.pipelines.features.building.config import FeatureConfig
from sae_harvest.pipelines.features.commands.diff import diff
from sae_harvest.pipelines.features.commands.query import query
from sae_harvest.pipelines.options import features_option
from sae_harvest.pipelines.viewer.cli import serve, site


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="sae-harvest")
def main() -> None:
    """Parquet tables of every latent of an SAE: build, show, query, compare, export.

    \b
    sae-features build --store runs/demo/store --sae runs/demo/sae --out runs/demo/features
    sae-features show 123 --features runs/demo/features
    """


main.add_command(query)
main.add_command(diff)
main.add_command(serve)
main.add_command(site)
main.add_command(export_command)
main.add_command(programs)
main.add_command(explain)
main.add_command(receipt)


class Places(BaseModel):
    """The places and the device of a build."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    store: Annotated[Place, Option("Places", "PLACE")] = Field(
        description="activation store: a folder, or s3://bucket/prefix"
    )
    sae: Annotated[
        str, AfterValidator(name_or_path("identity", "delphi")), Option("Places", "FOLDER")
    ] = Field(
        description="folder of a trained SAE; identity for the neurons; delphi if --store is a "
        "cache of delphi"
    )
    site: Annotated[str | None, Option("Places")] = Field(
        None,
        description="site of the neurons or of the cache, such as mlp_out.8, if there are several",
    )
    model: Annotated[
        Annotated[str, AfterValidator(name_or_path())] | None, Option("Places", "NAME")
    ] = Field(None, description="model of the cache, if the cache does not name it")
    out: Annotated[LocalPath, Option("Places", "FOLDER")] = Field(description="folder to write")
    device: Device = "auto"


class BuildSettings(CommandSettings):
    """The settings of `sae-features build`."""

    models = (Places, FeatureConfig)


@main.command()
@config_file_option
@options_for(BuildSettings.settings())
@grouped(
    "Execution",
    "--workers",
    type=CountRange(min=0),
    default=0,
    show_default=True,
    help="Ray workers; 0 builds in this process without Ray.",
)
@grouped(
    "Execution",
    "--address",
    help="Ray cluster: auto, or HOST:PORT. All nodes must be able to read --out.",
)
@click.pass_context
def build(
    context: click.Context, file: Path | None, workers: int, address: str | None, **given: Any
) -> None:
    """Build the tables latents, contexts, histograms, neighbours, tokens and documents.

    After an interruption at any moment, the same command continues.

    \b
    sae-features build --store runs/demo/store --sae runs/demo/sae --out runs/demo/features
    sae-features build --config features.yaml --top 40
    """
    settings = BuildSettings.of(context, file)
    places, config = settings.read(Places), settings.read(FeatureConfig)
    from sae_harvest.pipelines.features.building.progress import build_with_progress

    out = Path(places.out)
    built = build_with_progress(
        places.store,
        places.sae,
        out,
        config,
        site=places.site,
        model=places.model,
        workers=workers,
        address=address,
        device=places.device,
    )
    if built.seconds is None:
        output().print(f"{shown(out)}: the tables are there already.", soft_wrap=True)
    else:
        rate = built.run["n_rows"] / built.seconds
        output().print(
            f"{shown(out)}: {built.run['n_latents']:,} latents over {built.run['n_rows']:,} rows "
            f"({built.run['rows']}), {rate:,.0f} rows/s.",
            soft_wrap=True,
        )


@main.command()
@click.argument("latent", type=click.IntRange(min=0))
@features_option
@click.option(
    "--contexts",
    type=CountRange(min=1),
    default=10,
    show_default=True,
    help="Number of top contexts to print.",
)
def show(latent: int, features: Path, contexts: int) -> None:
    """Print a latent with its contexts highlighted.

    \b
    sae-features show 123 --features runs/demo/features
    """
    from sae_harvest.pipelines.features.reading.show import render_latent

    output().print(render_latent(features, latent, contexts))
