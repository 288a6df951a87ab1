"""The `sae-features` command: build, show, query."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from sae_harvest.common.console import (
    Commands,
    device_option,
    output,
    store_option,
)
from sae_harvest.common.numbers import CountRange
from sae_harvest.common.options import NameOption, PathOption
from sae_harvest.common.paths import shown
from sae_harvest.pipelines.exports.cli import export_command
from sae_harvest.pipelines.features.commands.query import query
from sae_harvest.pipelines.options import features_option
from sae_harvest.pipelines.viewer.cli import serve, site


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="sae-harvest")
def main() -> None:
    """Parquet tables of every latent of an SAE, and questions to them.

    \b
    sae-features build --store runs/demo/store --sae runs/demo/sae --out runs/demo/features
    sae-features show 123 --features runs/demo/features
    """


main.add_command(query)
main.add_command(serve)
main.add_command(site)
main.add_command(export_command)


@main.command()
@store_option
@click.option(
    "--sae",
    type=NameOption("identity", "delphi"),
    required=True,
    help="Folder of a trained SAE; identity for the neurons; delphi if --store is a cache of "
    "delphi's.",
)
@click.option(
    "--site", help="Site of the neurons or of the cache, such as mlp_out.8, if there are several."
)
@click.option(
    "--model", type=NameOption(), help="Model of the cache, if the cache does not name it."
)
@click.option("--out", type=PathOption(), required=True, help="Folder to write.")
@click.option(
    "--top",
    type=CountRange(1, 1000),
    default=20,
    show_default=True,
    help="Highest activations kept per latent, one per document.",
)
@click.option(
    "--random",
    "n_random",
    type=CountRange(0, 1000),
    default=10,
    show_default=True,
    help="Random activations kept per latent.",
)
@click.option(
    "--decile",
    "n_decile",
    type=CountRange(0, 100),
    default=2,
    show_default=True,
    help="Activations drawn from each tenth of a latent's firings.",
)
@click.option(
    "--silent",
    "n_silent",
    type=CountRange(0, 100),
    default=10,
    show_default=True,
    help="Rows kept where the latent is silent, and as many that look alike.",
)
@click.option(
    "--window",
    type=CountRange(min=1),
    default=64,
    show_default=True,
    help="Tokens shown around an activation.",
)
@click.option(
    "--seed",
    type=CountRange(0, 2**62 - 1),
    default=0,
    show_default=True,
    help="Seed of everything that is drawn.",
)
@click.option(
    "--workers",
    type=CountRange(min=0),
    default=0,
    show_default=True,
    help="Ray workers; 0 builds in this process without Ray.",
)
@click.option(
    "--address", help="Ray cluster: auto, or HOST:PORT. --out has to be seen by all of it."
)
@device_option
def build(
    store: str,
    sae: str,
    out: Path,
    top: int,
    n_random: int,
    n_decile: int,
    n_silent: int,
    window: int,
    seed: int,
    **execution: Any,
) -> None:
    """One pass over the store: latents, contexts, histograms, neighbours, tokens, documents.

    Killed at any moment, the same command continues.

    \b
    sae-features build --store runs/demo/store --sae runs/demo/sae --out runs/demo/features
    """
    from sae_harvest.pipelines.features.building.config import FeatureConfig
    from sae_harvest.pipelines.features.building.progress import build_with_progress

    config = FeatureConfig(
        n_top=top,
        n_random=n_random,
        n_decile=n_decile,
        n_inactive=n_silent,
        n_hard=n_silent,
        window_tokens=window,
        seed=seed,
    )
    built = build_with_progress(store, sae, out, config, **execution)
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
    help="Top contexts printed.",
)
def show(latent: int, features: Path, contexts: int) -> None:
    """Print a latent with its contexts highlighted.

    \b
    sae-features show 123 --features runs/demo/features
    """
    from sae_harvest.pipelines.features.reading.show import render_latent

    output().print(render_latent(features, latent, contexts))
