"""Options that several commands have."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click


class LocalPath(click.Path):
    """A path on this machine; an address such as s3://bucket/tables would become a folder `s3:`."""

    def __init__(self) -> None:
        super().__init__(path_type=Path)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if "://" in str(value):
            self.fail(f"{value!r} is an address; give a path on this machine.", param, ctx)
        return super().convert(value, param, ctx)


features_option = click.option(
    "--features",
    type=LocalPath(),
    default=Path("runs/demo/features"),
    show_default=True,
    help="Folder of the tables.",
)
