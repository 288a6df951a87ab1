"""Files to rows: JSON lines, CSV and Parquet, read a few rows at a time; plain text whole.

Reading goes on from any place in a file: by seeking in what is not compressed, by row group in
Parquet, by reading over the rest otherwise. Whatever is wrong with a file is told in one InputError
that names the file and the place in it.
"""

from __future__ import annotations

import csv
import io
import json
import sys
import zlib
from collections.abc import Callable, Iterator
from typing import IO, NamedTuple

from harvest.documents import Row
from harvest.inputs import COMPRESSED, TextFile, file_format, opened, unreadable
from store.errors import InputError

BLOCK_BYTES = 8 << 20

_PARQUET_BATCH_ROWS = 256
_PARQUET_BATCH_BYTES = 16 << 20

Columns = Callable[[tuple[str, ...]], list[str]]  # names of a file's columns to those to be read


class Place(NamedTuple):
    """Where in a file reading goes on: rows, lines and uncompressed bytes that are done.

    Lines and bytes are counted in JSON lines only.
    """

    rows: int = 0
    lines: int = 0
    offset: int = 0


def read_text(file: TextFile) -> str:
    """The whole of a text file, newlines as they are."""
    with opened(file) as stream:
        return _decoded(b"".join(_bytes(stream, file)), file.where)


def read_rows(file: TextFile, start: Place, columns: Columns) -> Iterator[tuple[str, Row, Place]]:
    """Rows of a JSON lines, CSV or Parquet file from a place on.

    Each comes with its name in messages and the place after it. Of Parquet files, only the columns
    that `columns` picks are read.
    """
    kind = file_format(file.where)
    if kind == ".parquet":
        return _parquet_rows(file, start.rows, columns)
    if kind == ".jsonl":
        return _json_rows(file, start)
    return _csv_file_rows(file, start.rows)


def _json_rows(file: TextFile, start: Place) -> Iterator[tuple[str, Row, Place]]:
    rows, lines, offset = start
    with opened(file) as stream:
        _skip(stream, file, offset)
        for number, line in enumerate(_bytes(stream, file), start=lines + 1):
            offset += len(line)
            label = f"line {number}"
            text = _decoded(line, f"{file.where}, {label}")
            if text.isspace():
                continue
            try:
                row = json.loads(text)
            except (ValueError, RecursionError) as error:
                raise InputError(
                    f"{file.where}, {label}, is not JSON ({error}); expected one object a line."
                ) from error
            if not isinstance(row, dict):
                raise InputError(
                    f"{file.where}, {label}, holds {type(row).__name__}; "
                    "expected one JSON object a line."
                )
            rows += 1
            yield label, row, Place(rows, number, offset)


def _csv_file_rows(file: TextFile, start: int) -> Iterator[tuple[str, Row, Place]]:
    with opened(file) as stream:
        for number, row in enumerate(csv_rows(stream, file.where), start=1):
            if number > start:
                yield f"row {number}", row, Place(number)


def csv_rows(stream: IO[bytes], where: str) -> Iterator[Row]:
    """Rows of comma-separated UTF-8 with a header; `where` names the stream in errors."""
    csv.field_size_limit(sys.maxsize)  # the module's own limit, 128 KiB, is below a long document
    reader = csv.DictReader(io.TextIOWrapper(stream, "utf-8-sig", newline=""))
    try:
        for row in reader:
            row.pop(None, None)  # fields past the header's end
            yield row
    except UnicodeDecodeError as error:
        raise _not_utf8(where) from error
    except (csv.Error, OSError, EOFError, zlib.error) as error:
        raise InputError(
            f"{where} cannot be read as CSV near line {reader.line_num} ({error}); expected "
            "comma-separated values with a header."
        ) from error


def _parquet_rows(file: TextFile, start: int, columns: Columns) -> Iterator[tuple[str, Row, Place]]:
    import pyarrow as pa
    from pyarrow import parquet

    number, begun = start, 0
    try:
        with (
            opened(file) as stream,
            parquet.ParquetFile(stream, buffer_size=BLOCK_BYTES) as table,
        ):
            names = columns(tuple(table.schema_arrow.names))
            for index in range(table.num_row_groups):
                group = table.metadata.row_group(index)
                first, begun = begun, begun + group.num_rows
                if begun <= start or not group.num_rows:
                    continue
                row_bytes = max(1, group.total_byte_size // group.num_rows)
                size = min(_PARQUET_BATCH_ROWS, max(1, _PARQUET_BATCH_BYTES // row_bytes))
                for batch in table.iter_batches(size, row_groups=[index], columns=names):
                    rest = batch.slice(min(max(0, start - first), len(batch)))
                    first += len(batch)
                    for row in rest.to_pylist():
                        number += 1
                        yield f"row {number}", row, Place(number)
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise InputError(
            f"{file.where} cannot be read as Parquet after row {number} ({reason}); "
            "expected a complete .parquet file."
        ) from error


def _skip(stream: IO[bytes], file: TextFile, n_bytes: int) -> None:
    """Goes on after `n_bytes` bytes: by seeking, or by reading where the stream is compressed."""
    try:
        if not file.where.lower().endswith(COMPRESSED):
            stream.seek(n_bytes)
            return
        while n_bytes and (block := stream.read(min(n_bytes, BLOCK_BYTES))):
            n_bytes -= len(block)
    except (OSError, EOFError, zlib.error) as error:
        raise unreadable(file.where, error) from error


def _bytes(stream: IO[bytes], file: TextFile) -> Iterator[bytes]:
    """The lines of a stream, as bytes, newlines kept."""
    try:
        yield from stream
    except (OSError, EOFError, zlib.error) as error:
        raise unreadable(file.where, error) from error


def _decoded(data: bytes, where: str) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise _not_utf8(where) from error


def _not_utf8(where: str) -> InputError:
    return InputError(f"{where} is not UTF-8 text; convert it to UTF-8, with iconv for example.")
