"""The `sae-features` command: build, show, query."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
from rich.table import Table
from rich.text import Text

from pipelines.exports.cli import export_command
from pipelines.options import features_option
from pipelines.viewer.cli import serve, site
from store.console import (
    SAME_COMMAND,
    Commands,
    Progress,
    output,
    store_option,
    when_interrupted,
)


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="sae-harvest")
def main() -> None:
    """Parquet tables of every latent of an SAE, and questions to them.

    \b
    sae-features build --store runs/demo/store --sae runs/demo/sae --out runs/demo/features
    sae-features show 123 --features runs/demo/features
    """


main.add_command(serve)
main.add_command(site)
main.add_command(export_command)


@main.command()
@store_option
@click.option(
    "--sae",
    required=True,
    help="Trained SAE; identity for the neurons themselves; delphi if --store is a cache of it.",
)
@click.option("--site", help="Of the neurons, if the store has several, or of the cache: mlp_out.8")
@click.option("--model", help="Of the cache, if it does not name it.")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder to write.")
@click.option(
    "--top",
    type=click.IntRange(1, 1000),
    default=20,
    show_default=True,
    help="Highest activations kept per latent, one per document.",
)
@click.option(
    "--random",
    "n_random",
    type=click.IntRange(0, 1000),
    default=10,
    show_default=True,
    help="Random activations kept per latent.",
)
@click.option(
    "--decile",
    "n_decile",
    type=click.IntRange(0, 100),
    default=2,
    show_default=True,
    help="Activations drawn from each tenth of a latent's firings.",
)
@click.option(
    "--silent",
    "n_silent",
    type=click.IntRange(0, 100),
    default=10,
    show_default=True,
    help="Rows kept where the latent is silent, and as many that look alike.",
)
@click.option(
    "--window",
    type=click.IntRange(min=1),
    default=64,
    show_default=True,
    help="Tokens shown around a peak.",
)
@click.option(
    "--seed",
    type=click.IntRange(0, 2**62 - 1),
    default=0,
    show_default=True,
    help="Of everything that is drawn.",
)
@click.option(
    "--workers",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    help="Ray workers; 0 builds in this process without Ray.",
)
@click.option(
    "--address", help="Ray cluster: auto, or HOST:PORT. --out has to be seen by all of it."
)
@click.option(
    "--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True
)
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
    **means: Any,
) -> None:
    """One pass over the store: latents, contexts, histograms, neighbours, tokens, documents.

    Killed at any moment, the same command continues.

    \b
    sae-features build --store runs/demo/store --sae runs/demo/sae --out runs/demo/features
    """
    from pipelines.features.config import FeatureConfig

    config = FeatureConfig(
        n_top=top,
        n_random=n_random,
        n_decile=n_decile,
        n_inactive=n_silent,
        n_hard=n_silent,
        window_tokens=window,
        seed=seed,
    )
    built = build_with_bar(store, sae, out, config, **means)
    if built.seconds is None:
        output().print(f"{out}: the tables are there already.", soft_wrap=True)
    else:
        rate = built.run["n_rows"] / built.seconds
        output().print(
            f"{out}: {built.run['n_latents']:,} latents over {built.run['n_rows']:,} rows "
            f"({built.run['rows']}), {rate:,.0f} rows/s.",
            soft_wrap=True,
        )


def build_with_bar(store: str | Path, sae: Path | str, out: Path, config: Any, **means: Any) -> Any:
    """`pipelines.features.build.build` with its progress, in a process that keeps its memory."""
    from pipelines.features.build import build as run_build
    from store.memory import keep_memory

    keep_memory()
    with when_interrupted(SAME_COMMAND), Progress() as progress:

        def show(what: str, done: int, total: int) -> None:
            progress(f"{what} {'blocks' if what == 'encoding' else 'latents'}", done, total)

        return run_build(store, sae, out, config, on_progress=show, **means)


@main.command()
@click.argument("latent", type=click.IntRange(min=0))
@features_option
@click.option(
    "--contexts",
    type=click.IntRange(min=1),
    default=10,
    show_default=True,
    help="Top contexts printed.",
)
def show(latent: int, features: Path, contexts: int) -> None:
    """Print a latent with its contexts highlighted.

    \b
    sae-features show 123 --features runs/demo/features
    """
    from pipelines.features.show import render_latent

    output().print(render_latent(features, latent, contexts))


@main.command()
@click.argument("sql")
@features_option
@click.option(
    "--limit",
    type=click.IntRange(min=1),
    default=50,
    show_default=True,
    help="Rows printed at most.",
)
def query(sql: str, features: Path, limit: int) -> None:
    """Run SQL over latents, contexts, histograms, neighbours, tokens, documents and firings.

    A terminal gets a table, a pipe or file tab-separated lines with nothing cut off.

    \b
    sae-features query "SELECT latent, density FROM latents ORDER BY density DESC LIMIT 5"
    """
    from pipelines.features.query import query as run_query
    from pipelines.features.show import visible

    columns, rows, more = run_query(features, sql, limit)
    cells = [[visible(_cell(value)) for value in row] for row in rows]
    console = output()
    if console.is_terminal:
        table = Table(box=None)
        for column in columns:
            table.add_column(Text(column), overflow="fold")
        for row in cells:
            table.add_row(*map(Text, row))
        console.print(table)
    else:
        for row in [columns, *cells]:
            click.echo("\t".join(row))
    if more:
        click.echo(f"… more rows; --limit {limit} were printed.", err=True)


def _cell(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, list):
        return ", ".join(_cell(v) for v in value)
    return "" if value is None else str(value)
