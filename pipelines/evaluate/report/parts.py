"""Measured parts of a report, each in a file, so that an evaluation continues where it ended.

    REPORT/parts/NAME.json     the figures and curves of one part, with the key they depend on

A part is measured again if its key has changed: the digests of store and SAE, and its settings.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, TypeAdapter, ValidationError

from sae_harvest.common.atomic import new_folder, write_text
from sae_harvest.common.errors import RunError
from sae_harvest.common.parsing import first_line
from sae_harvest.pipelines.evaluate.figures import Figure

FORMAT = 1  # of the files; a change of any metric's definition raises it


@dataclass(frozen=True, slots=True)
class Curve:
    """A line of a plot: a value for each of some things in order."""

    name: str
    """Name of the plot that the line belongs to, such as `fvu by position`."""

    subject: str
    """`SAE`, or the name of a baseline."""

    x: list[float]
    """Places on the horizontal axis [points]."""

    y: list[float | None]
    """Values [points]; None where there is none."""

    @classmethod
    def of(cls, name: str, subject: str, x: npt.NDArray[Any], y: npt.NDArray[Any]) -> Curve:
        """Make a curve from arrays [points]; NaN becomes None."""
        values = [float(value) if np.isfinite(value) else None for value in y]
        return cls(name, subject, [float(place) for place in x], values)


@dataclass(frozen=True, slots=True)
class Part:
    """The result of one part of an evaluation."""

    figures: list[Figure]
    """Values for the tables."""

    curves: list[Curve] = field(default_factory=list)
    """Lines for the plots."""

    notes: list[str] = field(default_factory=list)
    """Sentences about what was measured: sample sizes, rows left out."""

    seconds: float = 0.0
    """Time that the measurement took."""


class _File(BaseModel):
    format: int
    key: dict[str, Any]
    part: Part


class Parts:
    """The parts in a report's folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder / "parts"
        new_folder(self._folder)

    def get(self, name: str, key: dict[str, Any], measure: Callable[[], Part]) -> Part:
        """Return a part from its file, or measure it and write the file.

        Args:
            name: name of the part; a file name.
            key: what the part depends on, as JSON values.
            measure: returns the part.

        Raises:
            RunError: the file is damaged or cannot be written.
        """
        path = self._folder / f"{name}.json"
        found = _read(path)
        if found is not None and (found.format, found.key) == (FORMAT, key):
            return found.part
        part = measure()
        content = _File(format=FORMAT, key=key, part=part)
        write_text(path, TypeAdapter(_File).dump_json(content).decode() + "\n")
        return part


def _read(path: Path) -> _File | None:
    """Return the content of a part's file; None if there is none or it has another format."""
    try:
        return _File.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValidationError) as error:
        raise RunError(
            f"{path} is damaged ({first_line(error)}); remove it, and the part is measured again."
        ) from None
