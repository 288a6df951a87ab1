"""metrics.jsonl: one line per step, cut back to the checkpoint when a run continues."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import TracebackType
from typing import Any

from store.atomic import write_text
from store.errors import RunError

TAIL_BYTES = 1 << 16  # more than a line of metrics has


def _step(line: str, path: Path) -> int:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        raise RunError(
            f"{path} has a line that is not of a training run: {line.strip()[:60]!r}; move the "
            "file away to continue without the metrics so far."
        ) from None


class MetricsFile:
    """Appends lines; each is a JSON object with a `step`. A context manager."""

    def __init__(self, path: Path, last_step: int) -> None:
        """Keeps the lines up to `last_step`; later ones belong to steps that are done again."""
        kept = []
        if path.exists():
            for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
                # steps only grow; a line without its end was being written when the run died
                if not line.endswith("\n") or _step(line, path) > last_step:
                    break
                kept.append(line)
        write_text(path, "".join(kept))
        self._file = path.open("a", encoding="utf-8")

    def write(self, values: dict[str, Any]) -> None:
        """One line, handed to the operating system at once."""
        self._file.write(json.dumps(values) + "\n")
        self._file.flush()

    def __enter__(self) -> MetricsFile:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.close()


def last_metrics(path: Path) -> dict[str, Any]:
    """The last whole line of a metrics file, of a run that may be going on; empty without one."""
    if not path.exists():
        return {}
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - TAIL_BYTES))
        lines = file.read().split(b"\n")[:-1]  # what follows the last end of a line is unfinished
    for line in reversed(lines):
        try:
            found = json.loads(line)
        except ValueError:
            continue
        if isinstance(found, dict):
            return found
    return {}
