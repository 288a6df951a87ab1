"""One budget: what we take, what the limit takes, and how the two compare."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any


@dataclass(frozen=True, slots=True)
class Measurement:
    """`ratio` is value / limit. For rates it should be high, for times and bytes low.

    goal and floor bound the ratio; a release does not go past the floor. parts, where given, says
    what shares of the time went where.
    """

    name: str
    value: float
    limit: float
    unit: str
    goal: float
    floor: float
    higher_is_better: bool
    parts: dict[str, float] | None = None

    @property
    def ratio(self) -> float:
        return self.value / self.limit

    @property
    def meets_floor(self) -> bool:
        return self.ratio >= self.floor if self.higher_is_better else self.ratio <= self.floor

    def to_json(self) -> dict[str, Any]:
        return {
            "value": self.value,
            "limit": self.limit,
            "unit": self.unit,
            "ratio": self.ratio,
            "goal": self.goal,
            "floor": self.floor,
            "meets_floor": self.meets_floor,
            **({"parts": self.parts} if self.parts else {}),
        }


def alternate(
    ours: Callable[[], float], limit: Callable[[], float], repeats: int
) -> tuple[float, float]:
    """Medians of two figures taken in turns, so that both see the same neighbours."""
    pairs = [(ours(), limit()) for _ in range(repeats)]
    return median(a for a, _ in pairs), median(b for _, b in pairs)


def peak_bytes(pid: int | str = "self") -> int:
    """Most memory a process has had so far; 0 if it has ended.

    getrusage's may be that of the process that started it.
    """
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    lines = dict(line.split(":", 1) for line in status.splitlines())
    return int(lines["VmHWM"].split()[0]) * 1024 if "VmHWM" in lines else 0


def seconds(call: Callable[[], object], times: int = 1) -> float:
    """Wall time of calling something so many times."""
    start = time.perf_counter()
    for _ in range(times):
        call()
    return time.perf_counter() - start
