"""`sae-features diff`."""

from __future__ import annotations

from pathlib import Path

import click

from sae_harvest.common.console import Progress, output, when_interrupted
from sae_harvest.common.options import NameOption, PathOption, PlaceOption
from sae_harvest.common.paths import shown


@click.command()
@click.argument("a", type=PathOption())
@click.argument("b", type=PathOption())
@click.option("--out", type=PathOption(), required=True, help="New folder to write.")
@click.option(
    "--overlap",
    type=click.FloatRange(0, 1, min_open=True),
    default=0.5,
    show_default=True,
    help="Share of a latent's rows that counts as most of them.",
)
@click.option(
    "--sae",
    "saes",
    type=PathOption(),
    multiple=True,
    help="Folder of an SAE that has moved; repeat for the other one.",
)
@click.option(
    "--store",
    "stores",
    type=PlaceOption(),
    multiple=True,
    help="Folder or address of a store that has moved; repeat for the other one.",
)
@click.option(
    "--model",
    "models",
    type=NameOption(),
    multiple=True,
    help="The model of A's store, if it has moved: a folder or a name.",
)
def diff(
    a: Path,
    b: Path,
    out: Path,
    overlap: float,
    saes: tuple[Path, ...],
    stores: tuple[str, ...],
    models: tuple[str, ...],
) -> None:
    """Compare the latents of two SAEs, A and B, by the rows on which they fire.

    A and B are folders of tables over the same rows: of one store, or of stores with the same
    tokens. The classes are same, split, merged, absorbed, died and born; docs/diff.md defines them.

    \b
    sae-features build --store runs/demo/store --sae runs/demo/wide --out runs/demo/wide-features
    sae-features diff runs/demo/features runs/demo/wide-features --out runs/demo/diff
    """
    from sae_harvest.pipelines.evaluate.matching.diff import diff as compare
    from sae_harvest.pipelines.evaluate.matching.diff import summary
    from sae_harvest.pipelines.source import Locations

    nothing = f"Nothing was written into {out}; run the same command again."
    with when_interrupted(nothing), Progress() as progress:
        found = compare(a, b, out, overlap, Locations(saes, stores, models), progress)
    for line in summary(found):
        output().print(line, soft_wrap=True)
    output().print(f"{shown(out)}: matches.parquet, disagreements.parquet.", soft_wrap=True)
