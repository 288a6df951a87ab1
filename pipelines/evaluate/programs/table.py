"""`programs.parquet`: the programs of latents with their scores; docs/tables.md has the columns."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from sae_harvest.pipelines.evaluate.programs.counting import METRICS
from sae_harvest.pipelines.evaluate.programs.forms import Patterns
from sae_harvest.pipelines.evaluate.programs.scores import Scores

FORMAT = "1"
METADATA = {b"sae_harvest_programs": FORMAT.encode()}
OTHER = ("f1", "auprc", "pearson", "spearman")  # metrics of another latent's program
_LIMITS = [(f"{name}{end}", pa.float32()) for name in METRICS for end in ("", "_low", "_high")]
SCHEMA = pa.schema(
    [
        ("latent", pa.int32()),
        ("kind", pa.string()),
        ("program", pa.string()),
        ("threshold", pa.float32()),
        ("patterns", pa.list_(pa.list_(pa.int32()))),
        ("predictions", pa.list_(pa.float32())),
        ("rows", pa.int64()),
        ("positives", pa.int64()),
        *_LIMITS,
        ("recall_by_decile", pa.list_(pa.float32())),
        ("always_f1", pa.float32()),
        *((f"other_{name}", pa.float32()) for name in OTHER),
    ],
    METADATA,
)


def rows_of(
    latents: npt.NDArray[np.int64],
    kind: str,
    texts: Sequence[str],
    thresholds: npt.NDArray[np.float64],
    patterns: Patterns,
    scores: Scores,
) -> pa.Table:
    """Make the rows of the programs of one kind, of some latents [latents]."""
    n = len(latents)
    inner = pa.ListArray.from_arrays(
        pa.array(patterns.ends, pa.int32()), pa.array(patterns.token, pa.int32())
    )
    starts = pa.array(patterns.starts, pa.int32())
    share = scores.positives / max(scores.rows, 1)
    columns: dict[str, Any] = {
        "latent": latents.astype(np.int32),
        "kind": pa.array([kind] * n, pa.string()),
        "program": pa.array(texts, pa.string()),
        "threshold": _nullable(thresholds),
        "patterns": pa.ListArray.from_arrays(starts, inner),
        "predictions": pa.ListArray.from_arrays(starts, pa.array(patterns.value, pa.float32())),
        "rows": np.full(n, scores.rows, np.int64),
        "positives": scores.positives,
    }
    for number, name in enumerate(METRICS):
        for end, values in (("", scores.values), ("_low", scores.low), ("_high", scores.high)):
            columns[name + end] = _nullable(values[:, number])
    fired = scores.positives > 0
    width = scores.recall.shape[1]
    columns["recall_by_decile"] = pa.ListArray.from_arrays(
        pa.array(np.arange(n + 1) * width, pa.int32()), _nullable(scores.recall.reshape(-1))
    )
    columns["always_f1"] = _nullable(np.where(fired, 2 * share / (1 + share), np.nan))
    for name in OTHER:
        columns[f"other_{name}"] = _nullable(scores.other[:, METRICS.index(name)])
    return pa.table(columns, SCHEMA)


def _nullable(x: npt.NDArray[Any]) -> pa.Array:
    """Return float32 values; null where they are not finite."""
    return pa.array(x.astype(np.float32), mask=~np.isfinite(x))
