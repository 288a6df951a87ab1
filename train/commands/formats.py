"""`train-sae export` and `train-sae import`: SAEs in the formats of other packages."""

from __future__ import annotations

from pathlib import Path

import click

from sae_harvest.common.options import PathOption
from sae_harvest.common.paths import shown
from sae_harvest.train.sae.formats import FORMATS, export_sae, import_sae

format_option = click.option(
    "--format",
    "name",
    type=click.Choice(FORMATS),
    required=True,
    help="Package whose format is read or written.",
)


@click.command("export")
@click.option(
    "--sae",
    type=PathOption(),
    required=True,
    help="A trained SAE, the --out folder of `train-sae run`.",
)
@format_option
@click.option(
    "--out",
    type=PathOption(),
    required=True,
    help="Path to write: a .pt file for openai, a folder for the others.",
)
def export_command(sae: Path, name: str, out: Path) -> None:
    """Write an SAE in the format of another package.

    \b
    train-sae export --sae runs/demo/sae --format sparsify --out runs/demo/sparsify
    """
    exported = export_sae(sae, name, out)
    click.echo(f"Wrote SAE {exported.digest} to {shown(out)} for {name}.")


@click.command("import")
@format_option
@click.option(
    "--from",
    "path",
    metavar="PATH",
    type=PathOption(),
    required=True,
    help="Path of the SAE: a .pt file for openai, a folder for the others.",
)
@click.option(
    "--out",
    type=PathOption(),
    required=True,
    help="Folder to save the SAE in.",
)
@click.option(
    "--site", help="Site that the SAE reads, such as resid_post.12, if PATH does not say."
)
@click.option("--target-site", help="Site that a transcoder predicts, if PATH does not say.")
@click.option("--model", help="Name of the model that it was trained on, if PATH does not say.")
def import_command(
    name: str,
    path: Path,
    out: Path,
    site: str | None,
    target_site: str | None,
    model: str | None,
) -> None:
    """Save an SAE of another package in our own format.

    \b
    train-sae import --format sparsify --from runs/demo/sparsify --out runs/imported
    """
    from sae_harvest.train.sae.formats.reading import Origin

    sae = import_sae(name, path, out, Origin(site, target_site, model))
    click.echo(f"Saved SAE {sae.digest} in {shown(out)}, for {sae.config.site}.")


def add_format_commands(group: click.Group) -> None:
    """Add both commands to `train-sae`."""
    group.add_command(export_command)
    group.add_command(import_command)
