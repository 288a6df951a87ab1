"""The table `probes.parquet`: a row for each task and latent, or each task and other method."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field

import pyarrow as pa

FORMAT = "1"
ROW_GROUP = 4096
SCHEMA = pa.schema(
    [
        ("task", pa.string()),
        ("unit", pa.string()),
        ("method", pa.string()),
        ("k", pa.int32()),
        ("fitted", pa.string()),
        ("scored", pa.string()),
        ("rank", pa.int32()),
        ("features", pa.list_(pa.int32())),
        ("weights", pa.list_(pa.float64())),
        ("bias", pa.float64()),
        ("threshold", pa.float64()),
        ("pooling", pa.string()),
        ("n_negative", pa.int64()),
        ("n_positive", pa.int64()),
        ("loss", pa.float64()),
        ("loss_low", pa.float64()),
        ("loss_high", pa.float64()),
        ("auc", pa.float64()),
        ("auc_low", pa.float64()),
        ("auc_high", pa.float64()),
        ("f1", pa.float64()),
        ("f1_low", pa.float64()),
        ("f1_high", pa.float64()),
        ("accuracy", pa.float64()),
        ("accuracy_low", pa.float64()),
        ("accuracy_high", pa.float64()),
    ],
    {b"sae_harvest_probes": FORMAT.encode()},
)
ALL, TRAIN, TEST = "all", "train", "test"  # documents that a probe is fitted to, or scored on


@dataclass(frozen=True, slots=True)
class ProbeRow:
    """A row of the table; figures that are not known are None."""

    task: str
    """Name of the task."""
    unit: str
    """`documents` or `rows`."""
    method: str
    """`SAE`, or the name of a baseline."""
    k: int | None
    """Number of features; None for every channel, or for a direction in them."""
    fitted: str
    """Documents that the probe was fitted to: `all` or `train`."""
    scored: str
    """Documents that it was scored on: `all` or `test`."""
    rank: int
    """Rank by loss among the latents of the task, from 0."""
    n_negative: int
    """Negative examples that it was scored on."""
    n_positive: int
    """Positive examples that it was scored on."""
    pooling: str | None
    """Pooling of the values of a document's rows; None for rows."""
    features: list[int] | None = None
    """Latents, channels or components; None for every channel, or for no feature."""
    weights: list[float] = field(default_factory=list)
    """Weight of each feature, or of each channel; infinite if a threshold separates the classes."""
    bias: float | None = None
    """Bias; at an infinite weight, the log-odds at the threshold."""
    threshold: float | None = None
    """The threshold of an infinite weight."""
    loss: float | None = None
    """Cross-entropy in nats per example."""
    loss_low: float | None = None
    loss_high: float | None = None
    auc: float | None = None
    auc_low: float | None = None
    auc_high: float | None = None
    f1: float | None = None
    f1_low: float | None = None
    f1_high: float | None = None
    accuracy: float | None = None
    accuracy_low: float | None = None
    accuracy_high: float | None = None


def probes_table(rows: Iterable[ProbeRow]) -> pa.Table:
    """Return the table, sorted by unit, task, method, k, fit and rank."""
    ordered = sorted(
        rows, key=lambda r: (r.unit, r.task, r.method, r.k or 0, r.fitted, r.scored, r.rank)
    )
    return pa.Table.from_pylist([asdict(row) for row in ordered], SCHEMA)
