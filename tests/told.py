"""What a pool of workers tells of them, and which processes are alive."""

from __future__ import annotations

import re
from pathlib import Path


def started(told: list[str]) -> list[int]:
    """Process ids of the workers that have started."""
    found = (re.search(r"\(pid (\d+)\) started with", line) for line in told)
    return [int(match[1]) for match in found if match]


def gone(told: list[str]) -> list[str]:
    """The sentences about workers that have died."""
    return [line for line in told if " is gone: " in line]


def have_done_a_shard(told: list[str]) -> set[int]:
    """Process ids of the workers that have."""
    found = (re.search(r"^shard .* by .*\(pid (\d+)\)", line) for line in told)
    return {int(match[1]) for match in found if match}


def alive(pid: int) -> bool:
    try:
        return (Path("/proc") / str(pid) / "stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False
