"""Options that several commands have."""

from __future__ import annotations

from pathlib import Path

import click

features_option = click.option(
    "--features",
    type=click.Path(path_type=Path),
    default=Path("runs/demo/features"),
    show_default=True,
    help="Folder of the tables.",
)
