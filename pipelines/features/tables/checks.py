"""Checks of tables that may come from others, before anything is computed from them.

Columns and their types are those of `docs/tables.md`; rows are checked as they are read, so that a
page of one latent costs no pass over all of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from sae_harvest.common.errors import RunError
from sae_harvest.common.finite import all_finite
from sae_harvest.common.parsing import first_line
from sae_harvest.common.paths import exact_file
from sae_harvest.pipelines.features.tables.folder import (
    ADDED,
    EXPLANATIONS,
    FIRINGS,
    LABELS,
    PROGRAMS,
    QUESTIONS,
    SCORES,
    SIMULATIONS,
    STRATA,
    TABLES,
    check_tables,
    firing_files,
    require_run,
)

BINS = 384  # most bins of a histogram: 16 per octave, 24 octaves
LARGEST = 1e78  # squares of float32 activations are below this
NUMBERS, FLOATS, TEXTS = (pa.list_(kind) for kind in (pa.int32(), pa.float32(), pa.string()))
COLUMNS: dict[str, dict[pa.DataType, str]] = {  # names by type
    "latents": {
        pa.int32(): "latent n_tokens",
        pa.int64(): "n_fire n_contexts",
        pa.bool_(): "dead",
        pa.float64(): "density context_density max mean std skew kurtosis bimodality mean_square "
        "q10 q25 q50 q75 q90 q99 token_entropy_bits",
        pa.float32(): "encoder_norm decoder_norm encoder_decoder_cosine encoder_bias",
        TEXTS: "top_tokens strongest_tokens top_logit_tokens bottom_logit_tokens",
        FLOATS: "strongest_token_means position_profile top_logits bottom_logits",
        pa.list_(pa.int64()): "top_token_counts",
    },
    "contexts": {
        pa.int16(): "rank",
        pa.int32(): "latent position window_start",
        pa.int64(): "row document",
        pa.float32(): "activation",
        pa.string(): "stratum reason split text",
        NUMBERS: "token_ids token_ends",
        FLOATS: "activations",
    },
    "histograms": {
        pa.int16(): "bin",
        pa.int32(): "latent",
        pa.int64(): "count",
        pa.float64(): "low high",
    },
    "neighbours": {
        pa.int16(): "cosine_rank cofire_rank",
        pa.int32(): "latent other",
        pa.int64(): "cofire",
        pa.float32(): "decoder_cosine",
        pa.float64(): "jaccard",
    },
    "tokens": {
        pa.int32(): "token latent",
        pa.int64(): "count",
        pa.float32(): "mean share",
        pa.string(): "text",
    },
    "documents": {pa.int64(): "document", pa.string(): "source title url"},
    FIRINGS: {pa.int32(): "latent", pa.int64(): "row", pa.float32(): "value"},
    EXPLANATIONS: {pa.int64(): "latent", pa.string(): "explanation"},
    PROGRAMS: {
        pa.int32(): "latent",
        pa.int64(): "rows positives",
        pa.string(): "kind program",
        pa.float32(): "f1 f1_low f1_high other_f1 always_f1",
    },
    SCORES: {
        pa.int32(): "latent",
        pa.string(): "id subject task part metric",
        pa.float64(): "value low high",
        pa.int64(): "items failed",
    },
    SIMULATIONS: {
        pa.int32(): "latent",
        pa.string(): "id stratum",
        pa.int64(): "row first_row",
        pa.list_(pa.float32()): "activations simulated",
    },
    QUESTIONS: {pa.int32(): "latent", pa.string(): "id subject task part"},
    LABELS: {pa.int32(): "latent", pa.string(): "label kind", pa.float32(): "score"},
}


def require_tables(features: Path) -> dict[str, Any]:
    """Check that a folder has all tables, each with its columns; return run.json.

    Raises:
        RunError: there are no tables, or one is missing, damaged or has other columns; names it.
    """
    run = require_run(features)
    check_tables(features)
    for name in TABLES:
        check_columns(features / f"{name}.parquet", name)
    path = features / "latents.parquet"
    latents = _opened(path, lambda file: file.read(["latent"]))["latent"].to_numpy()
    if len(latents) != run["n_latents"] or (latents != np.arange(len(latents))).any():
        raise RunError(
            f"{path} does not hold the latents 0 to {run['n_latents'] - 1:,}, each once, as "
            "run.json says; build the tables again."
        )
    check_columns(firing_files(features)[0], FIRINGS)
    for name in ADDED:
        if (path := features / f"{name}.parquet").exists():
            check_columns(path, name)
    return run


def check_columns(path: Path, name: str) -> None:
    """Raise `RunError` if the file of a table is damaged or lacks a column."""
    schema = _opened(path, lambda file: file.schema_arrow)
    for kind, names in COLUMNS[name].items():
        for column in names.split():
            found = schema.get_all_field_indices(column)
            if len(found) != 1 or not _same(schema.field(found[0]).type, kind):
                there = schema.field(found[0]).type if len(found) == 1 else f"{len(found)} of them"
                remedy = "remove the file" if name in ADDED else "build the tables again"
                raise RunError(
                    f"{path} is no table of {name}: its column {column} should be {kind}, but "
                    f"is {there}; {remedy}."
                )


def require_whole(path: Path, table: pa.Table) -> None:
    """Raise `RunError` if a value, or a value of a list, is missing, or a number is not finite."""
    for name, column in zip(table.column_names, table.columns, strict=True):
        values = column
        if pa.types.is_list(column.type) or pa.types.is_large_list(column.type):
            values = pc.list_flatten(column)
        whole = not column.null_count and not values.null_count
        if not whole or (pa.types.is_floating(values.type) and not all_finite(values.to_numpy())):
            raise RunError(
                f"{path} is damaged (a value of {name} is missing or not finite); build the "
                "tables again."
            )


def check_latent(features: Path, facts: dict[str, Any]) -> None:
    """Raise `RunError` if the row of a latent lacks a value that all, or all that fire, have."""
    needed = ["n_fire", "density", "n_contexts", "context_density", "dead", "mean_square"]
    if not facts["dead"]:
        needed += ["max", "mean", "std", "q50", "q99"]
    lists = ("top_tokens", "top_token_counts", "strongest_tokens", "strongest_token_means")
    wrong = [name for name in needed if not _finite(facts[name])]
    numbers = (name for name in needed if _finite(facts[name]))
    wrong += [name for name in numbers if not 0 <= facts[name] <= LARGEST]
    wrong += [name for name in ("skew", "kurtosis") if abs(facts[name] or 0) > LARGEST]
    wrong += [name for name in lists if facts[name] is None or None in facts[name]]
    for ends in ("top", "bottom"):
        tokens, logits = facts[f"{ends}_logit_tokens"], facts[f"{ends}_logits"]
        if (tokens is None) != (logits is None) or None in [*(tokens or ()), *(logits or ())]:
            wrong.append(f"{ends}_logits")
    if len(facts["top_tokens"] or ()) != len(facts["top_token_counts"] or ()):
        wrong.append("top_token_counts")
    if not facts["dead"] and not (facts["n_fire"] or 0) > 0:
        wrong.append("n_fire")
    if wrong:
        raise _damaged(features, "latents", facts["latent"], f"{wrong[0]} has an impossible value")


def check_context(
    features: Path,
    latent: int,
    stratum: str | None,
    place: int | None,
    text: str | None,
    ends: Sequence[int | None] | None,
    activations: Sequence[float | None] | None,
) -> None:
    """Raise `RunError` if the parts of a context do not fit together.

    Args:
        place: place of the row among the tokens of the window.
        ends: where each token ends in the text.
    """
    if stratum not in STRATA:
        why = f"the stratum {stratum!r:.40} is unknown"
    elif place is None or text is None or not ends or activations is None:
        why = "a context lacks its position, text, tokens or activations"
    elif None in ends or ends[0] < 0 or ends[-1] > len(text) or list(ends) != sorted(ends):  # type: ignore
        why = "tokens of a context end outside its text"
    elif len(ends) != len(activations) or not 0 <= place < len(ends):
        why = "a context has tokens without activations, or its row is not in its window"
    elif None in activations or not math.isfinite(sum(activations)):  # type: ignore
        why = "an activation is not a finite number"
    else:
        return
    raise _damaged(features, "contexts", latent, why)


def check_histogram(
    features: Path, latent: int, rows: Sequence[Sequence[Any]], fires: bool = True
) -> None:
    """Raise `RunError` if rows (bin, low, high, count) are no histogram, or lack bins."""
    if fires and not rows:
        raise _damaged(features, "histograms", latent, "it fires and has no bins")
    for number, low, high, count in rows:
        whole = None not in (number, low, high, count)
        if not (whole and 0 <= number < BINS and low < high and count >= 0):
            raise _damaged(features, "histograms", latent, "a bin has an impossible value")


def _opened(path: Path, ask: Callable[[pq.ParquetFile], Any]) -> Any:
    """Call `ask` on a Parquet file; `RunError` if it is damaged."""
    try:
        with exact_file(path) as file, pq.ParquetFile(file) as parquet:
            return ask(parquet)
    except (OSError, ValueError, pa.ArrowException) as error:  # ValueError: a name is not UTF-8
        what = path if path.stem in ADDED else f"{path.parent} and build again"
        raise RunError(f"{path} is damaged ({first_line(error)}); remove {what}.") from error


def _damaged(features: Path, table: str, latent: int, why: str) -> RunError:
    return RunError(
        f"{features / table}.parquet is damaged (latent {latent}: {why}); build the tables again."
    )


def _finite(value: Any) -> bool:
    return value is not None and math.isfinite(value)


def _same(found: pa.DataType, kind: pa.DataType) -> bool:
    """True for equal types, but allow large texts and lists, and narrower integers."""
    if pa.types.is_list(kind):
        is_list = pa.types.is_list(found) or pa.types.is_large_list(found)
        return is_list and _same(found.value_type, kind.value_type)
    if pa.types.is_string(kind):
        return pa.types.is_string(found) or pa.types.is_large_string(found)
    if pa.types.is_integer(kind):
        return pa.types.is_integer(found) and found.bit_width <= kind.bit_width
    return found.equals(kind)
