"""Reading a YAML file of settings, strictly."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import click
import yaml

# YAML 1.1, which the parser speaks, takes 1e-3 for a text; 1.2 and everybody else for a number
_NUMBER = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?$")


class _Loader(yaml.SafeLoader):
    """Plain data; a key that is there twice is refused instead of the first being dropped."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = key_node.value
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} is there twice", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _NUMBER, list("-+.0123456789"))


def read_yaml(path: Path) -> dict[str, Any]:
    """The file's mapping.

    Raises:
        click.UsageError: it is not there, not YAML or not a mapping of names.
    """
    try:
        found = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except FileNotFoundError:
        raise click.UsageError(f"There is no file {path}.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise click.UsageError(f"{path} can't be read: {error}.") from None
    except yaml.YAMLError as error:
        raise click.UsageError(f"{path} is not YAML: {_where(error)}.") from None
    if found is None:
        return {}
    if not isinstance(found, dict) or not all(isinstance(key, str) for key in found):
        raise click.UsageError(f"{path} should hold lines like `k: 32`, a name and its value.")
    return found


def read_value(text: str) -> Any:
    """A value as a file would have it: `1e-3` is a number, `[1, 2]` a list.

    Raises:
        click.UsageError: it is not YAML.
    """
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise click.UsageError(f"{text!r} is not YAML: {_where(error)}.") from None


def _where(error: yaml.YAMLError) -> str:
    """What the parser says, and where, in one line."""
    problem = getattr(error, "problem", None) or str(error).splitlines()[0]
    mark = getattr(error, "problem_mark", None)
    return f"{problem} in line {mark.line + 1}" if mark else str(problem)
