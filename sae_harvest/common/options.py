"""Types of the options that name a file, a folder, a place or a model, and help in groups.

Each type makes its path absolute, so that it means the same after a change of folder and on other
machines, and refuses impossible file names. `Place` and `LocalPath` are types for fields of
configurations.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, TypeVar

import click
from pydantic import AfterValidator

from sae_harvest.common.parsing import MAX_NAME_BYTES
from sae_harvest.common.paths import absolute, absolute_name


def usable(value: str) -> str:
    """Return the value. Raise `ValueError` if it cannot be a path on this machine."""
    if not value or "\0" in value:
        raise ValueError(f"{value!a:.80} is not a path")
    if any(len(part) > MAX_NAME_BYTES for part in value.encode().split(b"/")):
        raise ValueError(f"{value!r:.80}… is too long for a path")
    return value


def local_path(value: str) -> str:
    """Return an absolute path on this machine. Raise `ValueError` for an address such as s3://a."""
    if "://" in usable(value):
        raise ValueError(f"{value!r} is an address; give a path on this machine")
    return absolute(value)


def local_or_remote(value: str) -> str:
    """Return an absolute folder, or an address such as s3://bucket/prefix, unchanged."""
    return absolute(usable(value))


def name_or_path(*words: str) -> Callable[[str], str]:
    """Return a function that makes a name absolute if it is a path and not one of `words`."""
    return lambda value: value if usable(value) in words else absolute_name(value)


F = TypeVar("F", bound=Callable[..., Any])
Place = Annotated[str, AfterValidator(local_or_remote)]
LocalPath = Annotated[str, AfterValidator(local_path)]


class PathOption(click.Path):
    """A file or folder on this machine, as an absolute `Path`."""

    def __init__(self, **checks: Any) -> None:
        super().__init__(path_type=Path, **checks)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        try:
            path = local_path(os.fspath(value))
        except ValueError as error:
            self.fail(f"{error}.", param, ctx)
        return super().convert(path, param, ctx)


class NameOption(click.ParamType):
    """An option that takes a path, made absolute, or one of `words`, kept as it is."""

    name = "text"

    def __init__(self, *words: str) -> None:
        self._read = name_or_path(*words)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        try:
            return self._read(value)
        except ValueError as error:
            self.fail(f"{error}.", param, ctx)


class PlaceOption(NameOption):
    """A folder, as an absolute path, or an address such as s3://bucket/prefix."""

    name = "place"

    def __init__(self) -> None:
        self._read = local_or_remote


class GroupedOption(click.Option):
    """An option that the help lists under a heading."""

    def __init__(self, *words: Any, group: str, **settings: Any) -> None:
        super().__init__(*words, **settings)
        self.group = group


def grouped(group: str, *words: str, **settings: Any) -> Callable[[F], F]:
    """Return a `click.option` that the help lists under the heading `group`."""
    return click.option(*words, cls=GroupedOption, group=group, **settings)


class Command(click.Command):
    """A command with help that lists grouped options after the others."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        groups: dict[str, list[tuple[str, str]]] = {}
        others: list[tuple[str, str]] = []
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record and isinstance(parameter, GroupedOption):
                groups[parameter.group] = [*groups.pop(parameter.group, []), record]
            elif record:
                others.append(record)
        for heading, records in {"Options": others, **groups}.items():
            with formatter.section(heading):
                formatter.write_dl(records)
