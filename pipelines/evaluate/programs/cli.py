"""`sae-features programs`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click
from rich.table import Table

from sae_harvest.common.console import (
    SAME_COMMAND,
    Progress,
    device_option,
    output,
    when_interrupted,
)
from sae_harvest.common.numbers import CountRange
from sae_harvest.common.options import NameOption, PathOption, PlaceOption
from sae_harvest.common.paths import shown
from sae_harvest.pipelines.options import features_option

if TYPE_CHECKING:
    from sae_harvest.pipelines.evaluate.figures import Figure


@click.command()
@features_option
@click.option(
    "--n2g-latents",
    type=CountRange(min=0),
    default=32,
    show_default=True,
    help="Latents with an N2G program, drawn from those that fire; 0 asks no model.",
)
@click.option(
    "--seed",
    type=CountRange(min=0),
    default=0,
    show_default=True,
    help="Seed of these draws, and of the random SAE that is compared.",
)
@device_option
@click.option("--sae", type=PathOption(), help="Folder of the SAE, if it has moved.")
@click.option(
    "--store", type=PlaceOption(), help="Folder or address of the store, if it has moved."
)
@click.option(
    "--model", type=NameOption(), help="The store's model, if it has moved: a folder or a name."
)
def programs(
    features: Path,
    n2g_latents: int,
    seed: int,
    device: str,
    sae: Path | None,
    store: str | None,
    model: str | None,
) -> None:
    """Write programs that predict each latent's activation from tokens: programs.parquet.

    Every latent gets a table of tokens and a trie of up to four tokens with wildcards, learnt from
    the firings; a random sample gets an N2G program, for which the model is asked. All are scored
    on every row of documents that they were not learnt from. After an interruption, the same
    command continues.

    \b
    sae-features programs --features runs/demo/features
    sae-features query "SELECT program, f1 FROM programs WHERE latent = 123"
    """
    from sae_harvest.pipelines.evaluate.programs.run import write_programs
    from sae_harvest.pipelines.source import Locations

    moved = Locations(
        saes=() if sae is None else [sae],
        stores=() if store is None else [store],
        models=() if model is None else [model],
    )
    with when_interrupted(SAME_COMMAND), Progress() as progress:
        figures = write_programs(
            features,
            n2g_latents=n2g_latents,
            seed=seed,
            device=device,
            moved=moved,
            on_progress=progress,
        )
    output().print(_table(figures))
    output().print(f"{shown(features / 'programs.parquet')} is written.", soft_wrap=True)


def _table(figures: Sequence[Figure]) -> Table:
    """Make a table of the means over latents: a row for each kind and metric."""
    subjects = list(dict.fromkeys(figure.subject for figure in figures))
    table = Table(box=None, title="means over latents with at least 10 held-out firings")
    table.add_column("", no_wrap=True)
    for subject in subjects:
        table.add_column(subject)
    cells = {(f.part, f.metric, f.subject): f for f in figures}
    for kind in dict.fromkeys(figure.part for figure in figures):
        counts = (cells.get((kind, "program_f1", subject)) for subject in subjects)
        table.add_row(f"{kind} (latents)", *("" if f is None else f"{f.count:,}" for f in counts))
        for metric in dict.fromkeys(figure.metric for figure in figures):
            found = (cells.get((kind, metric, subject)) for subject in subjects)
            table.add_row("  " + metric.removeprefix("program_"), *map(_cell, found))
    return table


def _cell(figure: Figure | None) -> str:
    if figure is None:
        return ""
    value, low, high = (
        None if x is None else f"{x:.3f}".replace("-0.000", "0.000")
        for x in (figure.value, figure.low, figure.high)
    )
    return f"{value}" if low is None else f"{value}\n{low} to {high}"
