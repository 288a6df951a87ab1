"""Ray nodes that can give the driver's bytes: those with the same versions of its libraries."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

from sae_harvest.harvest.run.actor import ShardActor
from sae_harvest.harvest.run.prepare import LIBRARIES


def versions() -> dict[str, str | None]:
    """Versions on this machine of the libraries that decide the bytes."""
    return ShardActor.versions(list(LIBRARIES))


def without_package(error: Exception) -> str | None:
    """A sentence if an actor died because its node has no sae-harvest, or None."""
    if "No module named 'sae_harvest'" not in str(error):
        return None
    return (
        f"A Ray node has no sae-harvest; install version {version('sae-harvest')} on every node, "
        "in the Python that its Ray runs in."
    )


def mismatch(expected: dict[str, str | None], node: dict[str, Any]) -> str | None:
    """A sentence about what a worker's machine lacks to give the driver's bytes, or None."""
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
