"""effects.parquet: a row is an operation on a latent at a row of the store, at a dose.

OUT/effects/sample.json       what was asked for, during a run
OUT/effects/000000.parquet    the effects at one row each; an interrupted run continues with them
OUT/effects.parquet           the table, when all are there
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from sae_harvest.common.atomic import replacing
from sae_harvest.common.differences import differences
from sae_harvest.common.errors import RunError
from sae_harvest.common.locks import claimed
from sae_harvest.common.paths import exact_file
from sae_harvest.pipelines.features.tables.folder import read_record
from sae_harvest.pipelines.features.tables.writers import TableWriter
from sae_harvest.train.run.files import write_json

NAME = "effects"
SAMPLE_FILE = "sample.json"
SAMPLE_KEY = b"sae_harvest_sample"
SCHEMA = pa.schema(
    [
        ("subject", pa.string()),
        ("operation", pa.string()),
        ("latent", pa.int32()),
        ("row", pa.int64()),
        ("dose", pa.float32()),
        ("document", pa.int64()),
        ("activation", pa.float32()),
        ("tokens", pa.int32()),
        ("vocabulary", pa.int32()),
        ("kl", pa.float64()),
        ("delta_ce", pa.float64()),
        ("l1", pa.float64()),
        ("l2", pa.float64()),
        ("up_ids", pa.list_(pa.int32())),
        ("up_texts", pa.list_(pa.string())),
        ("up_logits", pa.list_(pa.float32())),
        ("down_ids", pa.list_(pa.int32())),
        ("down_texts", pa.list_(pa.string())),
        ("down_logits", pa.list_(pa.float32())),
    ]
)
ORDER = [(name, "ascending") for name in ("subject", "operation", "latent", "row", "dose")]


class Parts:
    """The parts of a table that is being made; each is written once, whole."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def path(self, number: int) -> Path:
        return self._folder / f"{number:06d}.parquet"

    def missing(self, n: int) -> list[int]:
        """Return the numbers below n that have no part."""
        return [number for number in range(n) if not self.path(number).exists()]

    def write(self, number: int, rows: list[dict[str, Any]]) -> None:
        """Write a part. Raises RunError if the disk fails."""
        table = pa.Table.from_pylist(rows, SCHEMA)
        with replacing(self.path(number)) as temporary, exact_file(temporary, "wb") as file:
            pq.write_table(table, file)

    def table(self, n: int) -> pa.Table:
        """Return the n parts, sorted as in the table."""
        tables = [read(self.path(number)) for number in range(n)]
        return pa.concat_tables(tables).sort_by(ORDER).combine_chunks()


@contextmanager
def parts_of(out: Path, asked: dict[str, Any]) -> Iterator[Parts]:
    """Hold the folder of the parts while they are made.

    Args:
        out: folder of the table; made if missing.
        asked: all that the numbers in the table depend on.

    Raises:
        RunError: the folder holds parts of another sample, or another process makes them.
    """
    folder = out / NAME
    there = read_record(folder / SAMPLE_FILE)
    if there is not None:
        _require_same(folder, there, asked)
    foreign = f"{folder} holds other files than effects; choose another --out."
    busy = f"{folder} is being written by another process; wait for it."
    with claimed(folder, SAMPLE_FILE, foreign, busy):
        if there is None:
            write_json(folder / SAMPLE_FILE, asked)
        yield Parts(folder)


def finish(out: Path, parts: Parts, n: int, asked: dict[str, Any]) -> None:
    """Write the table from its n parts, and remove them."""
    table = parts.table(n).replace_schema_metadata({SAMPLE_KEY: json.dumps(asked).encode()})
    with TableWriter(out / f"{NAME}.parquet") as writer:
        writer.add(table)
    shutil.rmtree(out / NAME)


def finished(out: Path, asked: dict[str, Any]) -> bool:
    """True if the folder holds the table of this sample.

    Raises:
        RunError: it holds the table of another one, or a damaged one.
    """
    path = out / f"{NAME}.parquet"
    if not path.exists():
        return False
    found = read(path).schema.metadata or {}
    _require_same(path, json.loads(found.get(SAMPLE_KEY, b"{}")), asked)
    shutil.rmtree(out / NAME, ignore_errors=True)  # of a run that was killed at its end
    return True


def read(path: Path) -> pa.Table:
    """Read a table or a part; `RunError` if it is damaged."""
    try:
        with exact_file(path) as file:
            return pq.read_table(file)
    except (OSError, pa.ArrowException) as error:
        raise RunError(
            f"{path} is missing or damaged ({str(error).splitlines()[0]}); remove it and run the "
            "same command again."
        ) from error


def _require_same(path: Path, there: dict[str, Any], asked: dict[str, Any]) -> None:
    if differing := differences(there, asked):
        raise RunError(
            f"{path} holds effects of another sample (differing: {'; '.join(differing)}); choose "
            "another --out or remove it."
        )
