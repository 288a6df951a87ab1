"""One row of `metrics.parquet`: a figure with its interval, its rows and what it was measured on.

A metric has a row for each thing that was judged by it: the SAE, and the baselines beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from sae_harvest.pipelines.evaluate.intervals import Floats, interval

FORMAT = "1"
SAE_ITSELF = "SAE"
SCHEMA = pa.schema(
    [
        ("metric", pa.string()),
        ("subject", pa.string()),
        ("part", pa.string()),
        ("value", pa.float64()),
        ("low", pa.float64()),
        ("high", pa.float64()),
        ("count", pa.int64()),
        ("unit", pa.string()),
    ],
    {b"sae_harvest_metrics": FORMAT.encode()},
)


@dataclass(frozen=True, slots=True)
class Figure:
    """A measured value."""

    metric: str
    """Name of the metric; docs/metrics.md defines each."""

    subject: str
    """Name of the judged dictionary: `SAE`, or a baseline."""

    part: str
    """The part of the data, such as `without outliers`, or `position 3`."""

    value: float | None
    """The value; None if it is not defined, such as an average over no rows."""

    low: float | None
    """Lower limit of the 95 % interval; None for an exact count."""

    high: float | None
    """Upper limit of the 95 % interval; None for an exact count."""

    count: int
    """Number of things that the value was computed from."""

    unit: str
    """Kind of the counted things: rows, tokens, tasks, latents."""


def figure_of_sums(
    metric: str,
    subject: str,
    part: str,
    sums: Floats,
    of_sums: Callable[[Floats], Floats],
    count: int,
    unit: str,
) -> Figure:
    """Return a figure that is a function of sums, with its interval.

    Args:
        metric, subject, part, count, unit: fields of the figure.
        sums: float64 [clusters, ..., quantities], sums over the rows of each cluster.
        of_sums: takes sums [..., quantities], and returns the value; see `interval`.

    Returns:
        The figure; value and limits are None where they are not defined.
    """
    limits = interval(sums, of_sums) if count else None
    low, high = (None, None) if limits is None else map(defined, limits)
    return Figure(metric, subject, part, defined(of_sums(sums.sum(0))), low, high, count, unit)


def defined(value: Any) -> float | None:
    """Return a number; None if it is NaN or infinite."""
    return float(value) if np.isfinite(value) else None


def figures_table(figures: Iterable[Figure]) -> pa.Table:
    """Return the figures as a table, a row for each."""
    return pa.Table.from_pylist([asdict(figure) for figure in figures], SCHEMA)
