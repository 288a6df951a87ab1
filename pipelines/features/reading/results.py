"""The result of a query as text or as a file: CSV, JSON or Parquet, all rows or some.

CSV    UTF-8, comma, a header; NULL is empty, an empty text is "", a list is a JSON array
JSON   one array with an object per row, each on its own line; ASCII; NaN and infinity are null
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from decimal import Decimal
from itertools import chain
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq

from sae_harvest.common.atomic import replacing
from sae_harvest.common.errors import InputError, RunError
from sae_harvest.pipelines.features.reading.query import Question


def write_csv(question: Question, limit: int | None, sink: IO[bytes]) -> None:
    """Write a header, then a line for each row."""
    columns, rows = question.rows(limit)
    for row in chain([columns], rows):
        sink.write((",".join(map(_field, row)) + "\n").encode())


def write_json(question: Question, limit: int | None, sink: IO[bytes]) -> None:
    """Write an array of objects; `InputError` if two columns have the same name."""
    columns, rows = question.rows(limit)
    _require_distinct(columns)
    before = b"[\n"
    for row in rows:
        values = dict(zip(columns, map(json_value, row), strict=True))
        sink.write(before + json.dumps(values, allow_nan=False).encode())
        before = b",\n"
    sink.write(b"[]\n" if before == b"[\n" else b"\n]\n")


def write_parquet(question: Question, limit: int | None, sink: IO[bytes]) -> None:
    """Write the result in DuckDB's types; `InputError` for a type or name Parquet can't hold."""
    reader = question.arrow()
    _require_distinct(reader.schema.names)
    left = math.inf if limit is None else limit
    try:
        with pq.ParquetWriter(sink, reader.schema, compression="zstd") as writer:
            for batch in reader:
                batch = batch.slice(0, int(min(left, len(batch))))
                writer.write_batch(batch)
                left -= len(batch)
                if not left:
                    break
    except pa.ArrowException as error:
        why = str(error).splitlines()[0]
        raise InputError(f"Parquet cannot hold the result ({why}); cast it to VARCHAR.") from error


WRITERS: dict[str, Callable[[Question, int | None, IO[bytes]], None]] = {
    "csv": write_csv,
    "json": write_json,
    "parquet": write_parquet,
}


@contextmanager
def new_file(path: Path) -> Iterator[IO[bytes]]:
    """Open a new file for writing; it gets its name when it is complete.

    Raises:
        RunError: the path exists already, or cannot be written.
    """
    if path.exists():
        raise RunError(f"{path} exists already; choose another --output or remove it.")
    with replacing(path) as temporary, temporary.open("wb") as file:
        yield file


def json_value(value: Any) -> Any:
    """Convert a value of DuckDB for JSON: numbers, texts, arrays, objects; the rest to text."""
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float | Decimal):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, list | tuple):
        return [json_value(v) for v in value]
    if isinstance(value, dict):
        return {str(key): json_value(v) for key, v in value.items()}
    return value.hex() if isinstance(value, bytes) else str(value)


def _field(value: Any) -> str:
    """Format a value for CSV."""
    if value is None:
        return ""
    if isinstance(value, list | tuple | dict):
        text = json.dumps(json_value(value), allow_nan=False, ensure_ascii=False)
    else:
        text = value.hex() if isinstance(value, bytes) else str(value)
    if not text or any(letter in text for letter in ',"\r\n'):
        text = '"' + text.replace('"', '""') + '"'
    return text


def _require_distinct(columns: list[str]) -> None:
    for name in columns:
        if columns.count(name) > 1:
            raise InputError(f"Two columns have the name {name!r}; rename one with AS.")
