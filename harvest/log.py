"""What happened during a harvest, a line each, in a file that people read."""

from __future__ import annotations

import threading
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import IO

import xxhash

from store.paths import cache_dir

Report = Callable[[str], None]  # one sentence for people, about what the workers do


def log_path(place: str) -> Path:
    """The log of the harvests into a place, on the machine that drives them."""
    name = place.rstrip("/").rpartition("/")[2] or "store"
    return cache_dir() / "logs" / f"{name}-{xxhash.xxh3_64_hexdigest(place.encode())[:8]}.log"


class HarvestLog:
    """Appends lines with the time; used from several threads."""

    def __init__(self, place: str) -> None:
        self.path = log_path(place)
        self._lock = threading.Lock()
        self._file: IO[str] | None = None

    def __enter__(self) -> HarvestLog:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self.path.open("a", encoding="utf-8", buffering=1)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if error is not None:
            self.write(f"ended: {kind.__name__ if kind else ''}: {error}")
        if self._file is not None:
            self._file.close()

    def write(self, line: str) -> None:
        """Append a line."""
        if self._file is not None:
            now = datetime.now().astimezone().isoformat(sep=" ", timespec="seconds")
            with self._lock:
                self._file.write(f"{now}  {line}\n")
