"""Types of the command-line options that name a file, a folder, a place or a model.

Each makes its path absolute, so that no later change of folder and no worker on another machine
reads it in another way, and refuses what no file can be called.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import click

from sae_harvest.common.parsing import MAX_NAME_BYTES
from sae_harvest.common.paths import absolute, absolute_name


class PathOption(click.Path):
    """A file or folder on this machine, as an absolute `Path`.

    An address such as s3://bucket/tables is refused: it would become a folder called `s3:`.
    """

    def __init__(self, **checks: Any) -> None:
        super().__init__(path_type=Path, **checks)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        path = usable(os.fspath(value), self, param, ctx)
        if "://" in path:
            self.fail(f"{path!r} is an address; give a path on this machine.", param, ctx)
        return super().convert(absolute(path), param, ctx)


class PlaceOption(click.ParamType):
    """A folder, as an absolute path, or an address such as s3://bucket/prefix."""

    name = "place"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        return absolute(usable(value, self, param, ctx))


class NameOption(click.ParamType):
    """A name that may be a path, which is then made absolute, but for some `words`."""

    name = "text"

    def __init__(self, *words: str) -> None:
        self._words = words

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        name = usable(value, self, param, ctx)
        return name if name in self._words else absolute_name(name)


def usable(
    value: str,
    kind: click.ParamType,
    param: click.Parameter | None = None,
    ctx: click.Context | None = None,
) -> str:
    """The value; a usage error if no file on this machine can have it as its path."""
    if not value or "\0" in value:
        kind.fail(f"{value!a:.80} is not a path.", param, ctx)
    if any(len(part) > MAX_NAME_BYTES for part in value.encode().split(b"/")):
        kind.fail(f"{value!r:.80}… is too long for a path.", param, ctx)
    return value
