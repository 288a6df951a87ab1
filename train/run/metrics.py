"""metrics.jsonl: one line per step, cut back to the checkpoint when a run continues.

Its lines are on the disk before the checkpoint of their steps. So the file reaches the checkpoint
that a run continues from, even after a power cut.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from sae_harvest.common.atomic import sync_folder, write_bytes
from sae_harvest.common.errors import RunError
from sae_harvest.common.parsing import parse_json
from sae_harvest.train.run.records import Line

TAIL_BYTES = 1 << 16  # more than a line of metrics has


def _step(line: bytes, path: Path) -> int:
    try:
        return Line.model_validate(parse_json(line)).step
    except ValueError:
        raise RunError(
            f"{path} has a line that no training run writes: {line.strip()[:60]!r}; move the "
            "file away to continue without the metrics so far."
        ) from None


def _kept(path: Path, last_step: int) -> list[bytes]:
    """Return the lines up to `last_step`. Raise `RunError` if lines are missing between them."""
    kept: list[bytes] = []
    step = 0
    for line in path.read_bytes().splitlines(keepends=True):
        # a line without its end was being written when the run died
        if not line.endswith(b"\n") or (found := _step(line, path)) > last_step:
            break
        if kept and found != step + 1:
            raise RunError(
                f"{path} has step {found} after step {step}, so that lines are missing; put the "
                "whole file back, or move it away to continue without the metrics so far."
            )
        kept.append(line)
        step = found
    if step != last_step:
        raise RunError(
            f"{path} ends with step {step}, and the checkpoint to continue from is of step "
            f"{last_step}; put the whole file back, or move it away to continue without the "
            "metrics so far."
        )
    return kept


class MetricsFile:
    """A context manager that appends lines; each is a JSON object with a `step`."""

    def __init__(self, path: Path, last_step: int) -> None:
        """Keep the lines up to `last_step`; steps after it are done again.

        If the file is missing, a new one begins after `last_step`.

        Raises:
            RunError: the lines do not reach `last_step`, some are missing, or some are foreign.
        """
        self._path = path
        self._file: IO[str] | None = None
        if path.exists():
            write_bytes(path, _kept(path, last_step))

    def write(self, values: dict[str, Any]) -> None:
        """Write one line and flush it to the operating system."""
        if self._file is None:  # opened late: a file without lines would look truncated
            self._file = self._path.open("a", encoding="utf-8")
            sync_folder(self._path.parent)
        self._file.write(json.dumps(values) + "\n")
        self._file.flush()

    def sync(self) -> None:
        """Wait until all lines are on the disk."""
        if self._file is not None:
            os.fsync(self._file.fileno())

    def __enter__(self) -> MetricsFile:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._file is not None:
            self._file.close()


def last_metrics(path: Path) -> dict[str, Any]:
    """Return the last whole line of a metrics file, which a run may be writing; or {}."""
    if not path.exists():
        return {}
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - TAIL_BYTES))
        lines = file.read().split(b"\n")[:-1]  # the text after the last line end is unfinished
    for line in reversed(lines):
        try:
            found: dict[str, Any] = parse_json(line)
            Line.model_validate(found)
        except ValueError:
            continue
        return found
    return {}
