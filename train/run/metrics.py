"""metrics.jsonl: one line per step, cut back to the checkpoint when a run continues.

Its lines are on the disk before a checkpoint of their steps is, so that after a power cut as well
the file reaches the checkpoint that a run continues from.
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
            f"{path} has a line that is not of a training run: {line.strip()[:60]!r}; move the "
            "file away to continue without the metrics so far."
        ) from None


def _kept(path: Path, last_step: int) -> list[bytes]:
    """The lines up to `last_step`, which must be there without a gap from the first of them on."""
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
    """Appends lines; each is a JSON object with a `step`. A context manager."""

    def __init__(self, path: Path, last_step: int) -> None:
        """Keep the lines up to `last_step`; later ones belong to steps that are done again.

        A file that is not there is begun after `last_step`: its first line then says so.

        Raises:
            RunError: the lines do not reach `last_step`, or some are missing, or are not ours.
        """
        self._path = path
        self._file: IO[str] | None = None
        if path.exists():
            write_bytes(path, _kept(path, last_step))

    def write(self, values: dict[str, Any]) -> None:
        """One line, handed to the operating system at once."""
        if self._file is None:  # only now: a file without lines would be one that was cut
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
    """The last whole line of a metrics file, of a run that may be going on; empty without one."""
    if not path.exists():
        return {}
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - TAIL_BYTES))
        lines = file.read().split(b"\n")[:-1]  # what follows the last end of a line is unfinished
    for line in reversed(lines):
        try:
            found: dict[str, Any] = parse_json(line)
            Line.model_validate(found)
        except ValueError:
            continue
        return found
    return {}
