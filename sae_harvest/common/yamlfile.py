"""Strict reading of YAML settings within limits: a value, or one error sentence.

Only the types of YAML 1.2 are read: mappings, lists, texts, numbers, true and false, null. A date
stays a text. A tag such as `!!python/object`, a NUL and an infinite number are refused.
"""

from __future__ import annotations

import re
from math import isfinite
from pathlib import Path
from typing import Any

import click
import yaml
from yaml.constructor import ConstructorError
from yaml.nodes import CollectionNode, MappingNode, Node, ScalarNode

from sae_harvest.common.parsing import first_line
from sae_harvest.common.paths import shown

MAX_BYTES = 1 << 20  # a sweep of 10,000 members, one a line, takes half of it
MAX_DEPTH = 20  # recipes have 4
MAX_VALUES = 100_000  # with every alias replaced by its content
MAX_DIGITS = 100

_INT = re.compile(r"[-+]?[0-9][0-9_]*$")
# the parser's YAML 1.1 reads 1e-3 as a text; YAML 1.2 reads it as a number
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9][0-9_]*(\.[0-9]*)?)([eE][-+]?[0-9]+)?$")


class _Loader(yaml.SafeLoader):
    """Plain data within the limits above, and no key twice in a mapping."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._depth = 0
        self._sizes: dict[int, int] = {}  # values in a node, by its id

    def compose_node(self, parent: Node | None, index: int) -> Node | None:
        event = self.peek_event()
        if getattr(event, "tag", None) is not None:
            raise _fault(f"the tag {event.tag!r:.40} is not read here", event)
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise _fault(f"it is nested more than {MAX_DEPTH} levels deep", event)
        node = super().compose_node(parent, index)
        self._depth -= 1
        if node is not None and self._size(node, event) > MAX_VALUES:
            raise _fault(f"with its aliases it has more than {MAX_VALUES:,} values", event)
        return node

    def _size(self, node: Node, event: Any) -> int:
        """Return the number of values in a node; aliases count each time."""
        if isinstance(event, yaml.AliasEvent):
            if id(node) not in self._sizes:
                raise _fault("an alias stands inside of what it repeats", event)
        elif isinstance(node, MappingNode):
            children = [child for pair in node.value for child in pair]
            self._sizes[id(node)] = 1 + sum(self._sizes[id(child)] for child in children)
        elif isinstance(node, CollectionNode):
            self._sizes[id(node)] = 1 + sum(self._sizes[id(child)] for child in node.value)
        else:
            self._sizes[id(node)] = 1
        return self._sizes[id(node)]

    def construct_mapping(self, node: MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            if not isinstance(key_node, ScalarNode):
                raise _fault("a key is not a name", key_node)
            if key_node.value in seen:
                raise _fault(f"the key {key_node.value!r:.40} is there twice", key_node)
            seen.add(key_node.value)
        return super().construct_mapping(node, deep)

    def construct_yaml_int(self, node: ScalarNode) -> int:
        text = node.value.replace("_", "")
        if len(text) > MAX_DIGITS:
            raise _fault(f"a number has {len(text):,} digits", node)
        return int(text)

    def construct_yaml_float(self, node: ScalarNode) -> float:
        value = float(node.value.replace("_", ""))
        if not isfinite(value):
            raise _fault("a number is too large", node)
        return value

    def construct_yaml_str(self, node: ScalarNode) -> str:
        text = super().construct_yaml_str(node)
        if any(c == "\0" or "\ud800" <= c <= "\udfff" for c in text):
            raise _fault("a text has a character that is none", node)
        return text


TAG = "tag:yaml.org,2002:"
# the parser's own table also has octal and sexagesimal numbers, and dates
_Loader.yaml_implicit_resolvers = {
    first: [(tag, text) for tag, text in resolvers if tag[len(TAG) :] in ("null", "bool", "merge")]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_constructor(f"{TAG}int", _Loader.construct_yaml_int)
_Loader.add_constructor(f"{TAG}float", _Loader.construct_yaml_float)
_Loader.add_constructor(f"{TAG}str", _Loader.construct_yaml_str)
_Loader.add_implicit_resolver(f"{TAG}int", _INT, list("-+0123456789"))
_Loader.add_implicit_resolver(f"{TAG}float", _FLOAT, list("-+.0123456789"))


def read_yaml(path: Path) -> dict[str, Any]:
    """Return the file's mapping.

    Raises:
        click.UsageError: the file is missing, not YAML, beyond a limit, or not a mapping of names.
    """
    name = shown(path)
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
        if len(data) > MAX_BYTES:
            raise click.UsageError(f"{name} has more than {MAX_BYTES:,} bytes of settings.")
        found = _parsed(data.decode(), name)
    except FileNotFoundError:
        raise click.UsageError(f"There is no file {name}.") from None
    except (OSError, ValueError) as error:
        raise click.UsageError(f"{name} can't be read: {first_line(error)}.") from None
    if found is None:
        return {}
    if not isinstance(found, dict) or not all(isinstance(key, str) for key in found):
        raise click.UsageError(f"{name} should hold lines like `k: 32`, a name and its value.")
    return found


def read_value(text: str) -> Any:
    """Return a value written as in a file: `1e-3` is a number, `[1, 2]` a list.

    Raises:
        click.UsageError: it is not YAML, or beyond a limit.
    """
    shown = repr(text) if len(text) <= 60 else f"{text[:60]!r}…"
    return _parsed(text, shown)


def _parsed(text: str, where: str) -> Any:
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        problem = getattr(error, "problem", None) or first_line(error)
        mark = getattr(error, "problem_mark", None)
        line = f" in line {mark.line + 1}" if mark else ""
        raise click.UsageError(f"{where} cannot be read as YAML: {problem}{line}.") from None


def _fault(problem: str, at: Any) -> ConstructorError:
    return ConstructorError(None, None, problem, at.start_mark)
