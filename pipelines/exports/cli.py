"""`sae-features export`."""

from __future__ import annotations

from pathlib import Path

import click

from sae_harvest.common.console import Progress, output, when_interrupted
from sae_harvest.common.options import NameOption, PathOption, PlaceOption
from sae_harvest.common.paths import shown

FORMATS = ("neuronpedia", "delphi", "openai", "circuit-tracer")


@click.command("export")
@click.option(
    "--features",
    type=PathOption(),
    multiple=True,
    required=True,
    help="Folder of the tables; repeat for several layers.",
)
@click.option(
    "--format",
    "format_name",
    type=click.Choice(FORMATS),
    required=True,
    help="Package whose format is read or written.",
)
@click.option("--out", type=PathOption(), required=True, help="New folder to write.")
@click.option("--latents", metavar="0-99,512", help="Latents to export. Default: all.")
@click.option(
    "--name",
    help="Name in the export: delphi's hookpoint, Neuronpedia's source set, "
    "sae-viewer's folder, circuit-tracer's transcoder.",
)
@click.option(
    "--store",
    type=PlaceOption(),
    help="Place of the store, for the delphi export, if the store has moved.",
)
@click.option(
    "--model",
    type=NameOption(),
    help="Model of the store, for delphi, if it has moved: a folder or a name.",
)
def export_command(
    features: tuple[Path, ...],
    format_name: str,
    out: Path,
    latents: str | None,
    name: str | None,
    store: str | None,
    model: str | None,
) -> None:
    """Write feature tables in the format of another package.

    \b
    sae-features export --features runs/demo/features --format delphi --out runs/demo/delphi
    """
    from sae_harvest.pipelines.exports.export import export

    unit = "blocks" if format_name == "delphi" else "latents"
    with when_interrupted("Nothing was written."), Progress(unit) as progress:
        n_latents = export(
            features,
            out,
            format_name,
            latents=latents,
            name=name,
            store=store,
            model=model,
            on_progress=progress.counting("writing"),
        )
    output().print(f"{shown(out)}: {n_latents:,} latents for {format_name}.", soft_wrap=True)
