"""Values and bytes as damage or malice may leave them in a file, for property-based tests."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from typing import Any

import click
from hypothesis import strategies as st

from sae_harvest.common.errors import SaeHarvestError

NUMBERS = st.sampled_from(
    [0, 1, -1, 2, 0.5, -0.5, 1e308, 2**31, 2**63, 10**30, 10**400, True, False]
)
TEXTS = st.text(max_size=8) | st.sampled_from(
    ["", "..", "../x", "/etc", "a/b", "a\0b", "\ud800", "NaN", "1e6", "x" * 300, "topk", "none"]
)
SCALARS = st.none() | NUMBERS | TEXTS
VALUES = SCALARS | st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=6,
)


def _places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    items = value.items() if isinstance(value, dict) else ()
    items = enumerate(value) if isinstance(value, list) else items
    return [path, *(place for key, inner in items for place in _places(inner, (*path, key)))]


@st.composite
def altered(draw: st.DrawFn, value: Any) -> Any:
    """The value with one to three of its parts replaced, removed or added."""
    value = copy.deepcopy(value)
    for _ in range(draw(st.integers(1, 3))):
        path = draw(st.sampled_from(_places(value)))
        if not path:
            if draw(st.integers(0, 9)) == 0:
                return draw(VALUES)
            continue
        holder = value
        for key in path[:-1]:
            holder = holder[key]
        action = draw(st.sampled_from(["replace", "replace", "remove", "add"]))
        if action == "replace":
            holder[path[-1]] = draw(VALUES)
        elif action == "remove":
            del holder[path[-1]]
        elif isinstance(holder, dict):
            holder[draw(TEXTS)] = draw(VALUES)
        else:
            holder.append(draw(VALUES))
    return value


def json_text(value: Any) -> bytes:
    """As a writer without scruples would write it: infinity and lone surrogates as well."""
    return json.dumps(value).encode()


RAW = st.binary(max_size=60) | st.sampled_from(
    [b"[" * 100_000, b'{"a":' * 100_000, b"9" * 5000, b"NaN", b"\xff\xfe", b'"\\ud800"', b"null"]
)


@st.composite
def damaged(draw: st.DrawFn, data: bytes) -> bytes:
    """The bytes with some of them changed, or cut short."""
    found = bytearray(data)
    for _ in range(draw(st.integers(0, 4))):
        found[draw(st.integers(0, len(data) - 1))] = draw(st.integers(0, 255))
    return bytes(found[: draw(st.just(len(data)) | st.integers(0, len(data)))])


def outcome(work: Callable[[], Any]) -> Any:
    """What `work` gives; None if it was refused, after checking that that is one sentence."""
    try:
        return work()
    except (SaeHarvestError, click.UsageError) as error:
        sentence = error.message if isinstance(error, click.UsageError) else str(error)
        assert sentence.endswith("."), sentence
        assert len(sentence.splitlines()) == 1, sentence
        assert len(sentence) < 1500, sentence
        return None
