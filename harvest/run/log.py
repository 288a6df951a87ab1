"""The log of a harvest: a line for each event, in a text file for people."""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import IO

import xxhash

from sae_harvest.common.cache import configured_cache_dir, kept_cache_dir
from sae_harvest.common.masking import masked

Notify = Callable[[str], None]  # called with one sentence about the workers, for people


def log_path(place: str) -> Path | None:
    """Return the path of the log of harvests into a place, on the driver's machine.

    None if there is no home folder and no other folder was named.
    """
    cache = configured_cache_dir()
    name = place.rstrip("/").rpartition("/")[2] or "store"
    name += f"-{xxhash.xxh3_64_hexdigest(place.encode())[:8]}.log"
    return None if cache is None else cache / "logs" / name


class HarvestLog:
    """Appends lines with the time; used from several threads.

    A harvest does not need its log: if it cannot be written, one line on standard error says so,
    and the harvest continues.
    """

    def __init__(self, place: str) -> None:
        self.path = log_path(place) if kept_cache_dir() else None
        self._lock = threading.Lock()
        self._file: IO[str] | None = None
        self._gave_up = False

    def __enter__(self) -> HarvestLog:
        if self.path is not None:
            try:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                self._file = self.path.open("a", encoding="utf-8", buffering=1)
            except OSError as error:
                self._give_up(error)
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
            with contextlib.suppress(OSError):  # unwritten lines may fail again
                self._file.close()

    def write(self, line: str) -> None:
        """Append a line."""
        now = datetime.now().astimezone().isoformat(sep=" ", timespec="seconds")
        with self._lock:
            if self._file is None or self._gave_up:
                return
            try:
                self._file.write(f"{now}  {masked(line)}\n")
            except OSError as error:
                self._give_up(error)

    def _give_up(self, error: OSError) -> None:
        self._gave_up = True
        print(
            f"Note: the log {self.path} cannot be written ({error.strerror}); the harvest "
            "continues without it.",
            file=sys.stderr,
        )
