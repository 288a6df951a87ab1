"""The folder of a feature build: its tables by name, and run.json, which says what they are of."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa

from store.errors import RunError

FORMAT = "3"
TABLES = ("latents", "contexts", "histograms", "neighbours", "tokens", "documents")
FIRINGS = "firings"  # a folder of files
IDENTITY, DELPHI = "identity", "delphi"  # stand where the path of an SAE is asked for
WITHOUT_SAE = {IDENTITY: "neurons", DELPHI: "a cache of delphi's"}
RUN_FILE, BUILDING_FILE = "run.json", "building.json"


def with_version(table: pa.Table) -> pa.Table:
    """The table with the format's version in its metadata."""
    metadata = {b"sae_harvest_tables": FORMAT.encode()} | (table.schema.metadata or {})
    return table.replace_schema_metadata(metadata)


def read_run(features: Path) -> dict[str, Any] | None:
    """run.json of finished tables, None if there are none.

    Trained SAEs have a run.json too, which says nothing about tables.

    Raises:
        RunError: it is damaged, or of another version of the format.
    """
    run = read_record(features / RUN_FILE)
    if run is None or "tables" not in run:
        return None
    if run["tables"] != FORMAT:
        raise RunError(
            f"{features} holds tables of format {run['tables']}, this version reads {FORMAT}; "
            "build them again into another folder."
        )
    return run


def require_run(features: Path) -> dict[str, Any]:
    """run.json of finished tables; `RunError` if there are none, or of another version."""
    run = read_run(features)
    if run is None:
        raise RunError(
            f"{features} holds no feature tables (no {RUN_FILE} there); "
            "give the folder that `sae-features build --out` wrote."
        )
    return run


def read_record(path: Path) -> dict[str, Any] | None:
    """A JSON object from a file; None if there is no file. `RunError` if it is damaged."""
    try:
        record = json.loads(path.read_text())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        raise RunError(
            f"{path} is damaged ({error}); build the tables again into another folder."
        ) from None
    return record if isinstance(record, dict) else None


def check_tables(features: Path) -> None:
    """Raise `RunError`, naming it, if a table is missing."""
    for name in TABLES:
        path = features / f"{name}.parquet"
        if not path.is_file():
            raise RunError(f"{path} is missing; remove {features} and build the tables again.")
