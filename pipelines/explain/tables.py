"""The tables of explanations, written beside the tables of an SAE; docs/tables.md describes them.

Rows of latents that are explained again are replaced; those of others stay.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from sae_harvest.common.errors import RunError
from sae_harvest.common.parsing import first_line
from sae_harvest.pipelines.features.tables.folder import (
    EXPLANATIONS,
    QUESTIONS,
    SCORES,
    SIMULATIONS,
)
from sae_harvest.pipelines.features.tables.writers import TableWriter

FORMAT = "1"
VERSION = b"sae_harvest_explanations"
FLOATS, ROWS = pa.list_(pa.float32()), pa.list_(pa.int64())
SCHEMAS: dict[str, pa.Schema] = {
    EXPLANATIONS: pa.schema(
        [
            ("latent", pa.int32()),
            ("explanation", pa.string()),
            ("id", pa.string()),
            ("chosen", pa.bool_()),
            ("candidate", pa.int16()),
            ("parent", pa.string()),
            ("validation", pa.float32()),
            ("useful", pa.bool_()),
            ("failure", pa.string()),
            ("model", pa.string()),
            ("prompt", pa.string()),
            ("temperature", pa.float32()),
            ("seed", pa.int64()),
            ("rows", ROWS),
            ("prompt_tokens", pa.int64()),
            ("new_tokens", pa.int64()),
        ]
    ),
    SCORES: pa.schema(
        [
            ("latent", pa.int32()),
            ("id", pa.string()),
            ("subject", pa.string()),
            ("task", pa.string()),
            ("part", pa.string()),
            ("metric", pa.string()),
            ("value", pa.float64()),
            ("low", pa.float64()),
            ("high", pa.float64()),
            ("items", pa.int64()),
            ("true_items", pa.int64()),
            ("documents", pa.int64()),
            ("failed", pa.int64()),
            ("model", pa.string()),
            ("prompt", pa.string()),
        ]
    ),
    SIMULATIONS: pa.schema(
        [
            ("latent", pa.int32()),
            ("id", pa.string()),
            ("stratum", pa.string()),
            ("row", pa.int64()),
            ("first_row", pa.int64()),
            ("document", pa.int64()),
            ("tokens", pa.list_(pa.string())),
            ("activations", FLOATS),
            ("simulated", FLOATS),
            ("failure", pa.string()),
        ]
    ),
    QUESTIONS: pa.schema(
        [
            ("latent", pa.int32()),
            ("id", pa.string()),
            ("subject", pa.string()),
            ("task", pa.string()),
            ("part", pa.string()),
            ("rows", ROWS),
            ("right", pa.int16()),
            ("probabilities", pa.list_(pa.float64())),
            ("failure", pa.string()),
        ]
    ),
}


def write_tables(
    features: Path, latents: Sequence[int], rows: Mapping[str, Iterable[dict[str, Any]]]
) -> None:
    """Write the rows of latents into all tables, in the place of their earlier rows.

    Args:
        features: folder of the tables.
        latents: the latents.
        rows: name of a table → its new rows, in the order of their latents.

    Raises:
        RunError: a table is damaged or cannot be written.
    """
    for name, schema in SCHEMAS.items():
        new = pa.Table.from_pylist(list(rows[name]), schema)
        old = _kept(features / f"{name}.parquet", schema, latents)
        joined = pa.concat_tables([old, new])
        order = pc.sort_indices(joined["latent"])  # stable: rows of a latent keep their order
        table = joined.take(order).replace_schema_metadata({VERSION: FORMAT.encode()})
        with TableWriter(features / f"{name}.parquet") as writer:
            writer.add(table)


def _kept(path: Path, schema: pa.Schema, latents: Sequence[int]) -> pa.Table:
    """Return the rows of other latents of a table; none if there is no table."""
    if not path.is_file():
        return schema.empty_table()
    try:
        table = pq.read_table(path)
        if not set(schema.names) <= set(table.column_names):
            return _of_a_user(path, table, schema, latents)
        return _others(table.select(schema.names).cast(schema), latents)
    except (OSError, pa.ArrowException) as error:
        raise RunError(
            f"{path} cannot be read ({first_line(error)}); remove it and run the same command."
        ) from None


def _of_a_user(path: Path, table: pa.Table, schema: pa.Schema, latents: Sequence[int]) -> pa.Table:
    """Return the explanations of a table with the columns latent and explanation only."""
    if path.stem != EXPLANATIONS or not {"latent", "explanation"} <= set(table.column_names):
        raise RunError(f"{path} has other columns; move it away and run the same command.")
    rows = _others(table.select(["latent", "explanation"]), latents).to_pylist()
    return pa.Table.from_pylist([row | {"chosen": True} for row in rows], schema)


def _others(table: pa.Table, latents: Sequence[int]) -> pa.Table:
    replaced = pa.array(latents, table["latent"].type)
    return table.filter(pc.invert(pc.is_in(table["latent"], replaced)))
