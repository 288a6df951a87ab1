"""Comparison of two descriptions of a job, for the message that refuses the second."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def differences(
    there: Mapping[str, Any], here: Mapping[str, Any], options: Mapping[str, str] | None = None
) -> list[str]:
    """Return `name: there → here` for each field of `here` in which `there` differs.

    Args:
        options: field, with dots for nesting → the option that is shown instead of its name.

    >>> differences({"config": {"seed": 0}}, {"config": {"seed": 1}}, {"config.seed": "--seed"})
    ['--seed: 0 → 1']
    """
    old, new = flat(there), flat(here)
    names = [
        name
        for name in dict.fromkeys((*new, *old))
        if name.partition(".")[0] in here and old.get(name) != new.get(name)
    ]
    options = options or {}
    return [f"{options.get(name, name)}: {old.get(name)} → {new.get(name)}" for name in names]


def flat(fields: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten nested mappings: keys are joined by dots."""
    items: dict[str, Any] = {}
    for key, value in fields.items():
        if isinstance(value, Mapping) and value:
            items |= flat(value, f"{prefix}{key}.")
        else:
            items[f"{prefix}{key}"] = value
    return items
