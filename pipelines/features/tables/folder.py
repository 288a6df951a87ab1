"""The folder of a feature build: its tables by name, and run.json, the record of their ancestry."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any

import pyarrow as pa
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from sae_harvest.common.errors import RunError
from sae_harvest.common.parsing import first_line, parse_json

FORMAT = "3"
TABLES = ("latents", "contexts", "histograms", "neighbours", "tokens", "documents")
FIRINGS = "firings"  # a folder of files
EXPLANATIONS = "explanations"  # a table that may be added: latent, explanation
PROGRAMS = "programs"  # a table that `sae-features programs` adds
# tables that `sae-features explain` adds
SCORES, SIMULATIONS, QUESTIONS, LABELS = "scores", "simulations", "questions", "labels"
ADDED = (EXPLANATIONS, PROGRAMS, SCORES, SIMULATIONS, QUESTIONS, LABELS)
IDENTITY, DELPHI = "identity", "delphi"  # used in place of the path of an SAE
WITHOUT_SAE = {IDENTITY: "neurons", DELPHI: "a cache of delphi"}
RUN_FILE, BUILDING_FILE = "run.json", "building.json"
DECILES = 10
FIRING = ("top", *(f"decile_{tenth}" for tenth in range(1, DECILES + 1)), "random")
STRATA = (*FIRING, "inactive", "hard_negative")  # of contexts
FIRINGS_FILE = r"\d{6,9}\.parquet"
MAX_RECORD_BYTES = 1 << 20
MAX_LATENTS = 2**31 - 1  # numbers of latents are int32


def _printable(text: str) -> str:
    if not text or any(ord(character) < 32 or ord(character) == 127 for character in text):
        raise ValueError("it is empty or has a control character")
    text.encode()  # a lone surrogate is a ValueError
    return text


Text = Annotated[str, AfterValidator(_printable)]


class Relative(BaseModel):
    """Paths relative to the tables' folder, for sources on the same disk."""

    store: Text | None = None
    sae: Text | None = None


class Run(BaseModel):
    """run.json: the ancestry of the tables.

    store, sae: places at the time of the build; relative: the same, from the folder of the tables.
    Both may have moved, so the digests decide. n_rows: rows that were read.
    """

    model_config = ConfigDict(extra="allow")

    tables: Text
    store: Text
    store_digest: Text
    sae: Text
    sae_digest: Text
    relative: Relative = Relative()
    site: str = Field(pattern=r"^[a-z_]+\.[0-9]{1,6}$")
    model: Text
    n_latents: int = Field(strict=True, ge=1, le=MAX_LATENTS)
    context_length: int = Field(strict=True, ge=1, le=2**31 - 1)
    rows: str
    n_rows: int = Field(strict=True, ge=0, le=2**62)
    cofire_rows: int = Field(strict=True, ge=0, le=2**62)


def with_version(table: pa.Table) -> pa.Table:
    """Return the table with the format's version in its metadata."""
    metadata = {b"sae_harvest_tables": FORMAT.encode()} | (table.schema.metadata or {})
    return table.replace_schema_metadata(metadata)


def read_run(features: Path) -> dict[str, Any] | None:
    """Read run.json of finished tables; None if there are none.

    Trained SAEs have a run.json too, without data about tables.

    Raises:
        RunError: it is damaged, or has another version of the format.
    """
    path = features / RUN_FILE
    run = read_record(path)
    if run is None or "tables" not in run:
        return None
    if run["tables"] != FORMAT:
        raise RunError(
            f"{features} holds tables of format {run['tables']!s:.20}, this version reads "
            f"{FORMAT}; build them again into another folder."
        )
    try:
        return Run.model_validate(run).model_dump()
    except ValidationError as error:
        raise _damaged(path, error) from None


def require_run(features: Path) -> dict[str, Any]:
    """Read run.json of finished tables; `RunError` if there are none, or of another version."""
    run = read_run(features)
    if run is None:
        raise RunError(
            f"{features} holds no feature tables (no {RUN_FILE} there); "
            "give the folder that `sae-features build --out` wrote."
        )
    return run


def read_record(path: Path) -> dict[str, Any] | None:
    """Read a JSON object from a file; None if there is no file. `RunError` if it is damaged."""
    try:
        record = parse_json(path.read_bytes(), MAX_RECORD_BYTES)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        raise _damaged(path, error) from None
    return record if isinstance(record, dict) else None


def _damaged(path: Path, error: Exception) -> RunError:
    return RunError(
        f"{path} is damaged ({first_line(error)}); build the tables again into another folder."
    )


def check_tables(features: Path) -> None:
    """Raise `RunError` with the name of a missing table."""
    for name in TABLES:
        path = features / f"{name}.parquet"
        if not path.is_file():
            raise RunError(f"{path} is missing; remove {features} and build the tables again.")


def firing_files(features: Path) -> list[Path]:
    """List the files of firings in the order of their rows; `RunError` if there are none."""
    folder = features / FIRINGS
    found = folder.iterdir() if folder.is_dir() else ()
    paths = sorted(path for path in found if re.fullmatch(FIRINGS_FILE, path.name))
    if not paths:
        raise RunError(f"{folder} is missing; remove {features} and build the tables again.")
    return paths
