"""Command line options that several commands share."""

from __future__ import annotations

from pathlib import Path

import click

from sae_harvest.common.options import PathOption

features_option = click.option(
    "--features",
    type=PathOption(),
    default=Path("runs/demo/features"),
    show_default=True,
    help="Folder of the tables.",
)
