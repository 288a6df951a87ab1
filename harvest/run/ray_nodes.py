"""Checks that a Ray node computes the driver's bytes: it has the same versions of libraries."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

from sae_harvest.harvest.run.actor import ShardActor
from sae_harvest.harvest.run.prepare import LIBRARIES


def versions() -> dict[str, str | None]:
    """Return this machine's versions of the libraries that decide the bytes."""
    return ShardActor.versions(list(LIBRARIES))


def without_package(error: Exception) -> str | None:
    """Return a sentence if an actor died because its node has no sae-harvest, else None."""
    if "No module named 'sae_harvest'" not in str(error):
        return None
    return (
        f"A Ray node has no sae-harvest; install version {version('sae-harvest')} on every node, "
        "in the Python that its Ray runs in."
    )


def mismatch(expected: dict[str, str | None], node: dict[str, Any]) -> str | None:
    """Return a sentence about the libraries of a worker's machine that differ, or None."""
    installed = node["versions"]
    if installed == expected:
        return None
    host = node["host"]
    differing = [
        f"{name} {installed[name] or 'missing'} instead of {expected[name]}"
        for name in expected
        if installed[name] != expected[name]
    ]
    return f"The Ray node {host} has {', '.join(differing)}; install the same on every node."
