"""Files on disk to rows: JSON lines, CSV and Parquet, read a few rows at a time; plain text whole.

Whatever is wrong with a file is told in one InputError that names the file and the place in it.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path, PurePath
from typing import IO, Any

from store.errors import InputError

SUFFIXES = (".txt", ".jsonl", ".csv", ".parquet", ".txt.gz", ".jsonl.gz", ".csv.gz")

_PARQUET_BATCH_ROWS = 256

Row = dict[str, Any]


def read_text(path: Path) -> str:
    """The whole of a text file, newlines as they are."""
    with opened(path) as stream:
        return _decoded(b"".join(_bytes(stream, path)), str(path))


def read_rows(path: Path) -> Iterator[tuple[str, Row]]:
    """Rows of a JSON lines, CSV or Parquet file, each with its place in the file."""
    kind = file_format(path)
    if kind == ".parquet":
        return _parquet_rows(path)
    if kind == ".jsonl":
        return _json_rows(path)
    return _csv_file_rows(path)


def _json_rows(path: Path) -> Iterator[tuple[str, Row]]:
    with opened(path) as stream:
        for number, line in enumerate(_bytes(stream, path), start=1):
            place = f"line {number}"
            text = _decoded(line, f"{path}, {place}")
            if text.isspace():
                continue
            try:
                row = json.loads(text)
            except (ValueError, RecursionError) as error:
                raise InputError(
                    f"{path}, {place}, is not JSON ({error}); expected one object a line."
                ) from error
            if not isinstance(row, dict):
                raise InputError(
                    f"{path}, {place}, holds {type(row).__name__}; expected one JSON object a line."
                )
            yield place, row


def _csv_file_rows(path: Path) -> Iterator[tuple[str, Row]]:
    with opened(path) as stream:
        for number, row in enumerate(csv_rows(stream, str(path)), start=1):
            yield f"row {number}", row


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


def _parquet_rows(path: Path) -> Iterator[tuple[str, Row]]:
    import pyarrow as pa
    from pyarrow import parquet

    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(_PARQUET_BATCH_ROWS):
                for row in batch.to_pylist():
                    number += 1
                    yield f"row {number}", row
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise InputError(
            f"{path} cannot be read as Parquet after row {number} ({reason}); "
            "expected a complete .parquet file."
        ) from error


def find_files(path: Path) -> list[tuple[str, Path]]:
    """The files under `path`, each with the name documents carry, in the order they are read."""
    if path.is_file():
        if not file_format(path):
            raise InputError(
                f"{path} has the suffix {path.suffix or '(none)'}, expected one of "
                f"{', '.join(SUFFIXES)}; rename or convert the file."
            )
        return [(path.name, path)]
    found = [
        file.relative_to(path) for file in path.rglob("*") if file_format(file) and file.is_file()
    ]
    shown = [file for file in found if not any(part.startswith(".") for part in file.parts)]
    if not shown:
        raise InputError(
            f"The folder {path} holds no file to read, expected at least one ending in "
            f"{', '.join(SUFFIXES)}; check the path."
        )
    return sorted((file.as_posix(), path / file) for file in shown)


def file_format(path: PurePath) -> str:
    """The suffix that decides how a file is read, `.gz` taken off; empty for an unknown one."""
    name = path.name.lower()
    return PurePath(name.removesuffix(".gz")).suffix if name.endswith(SUFFIXES) else ""


def opened(path: Path, compressed: bool = True) -> IO[bytes]:
    """The file's bytes; with `compressed`, those of a .gz file are its contents."""
    try:
        if compressed and path.name.lower().endswith(".gz"):
            return io.BufferedReader(gzip.open(path, "rb"))
        return path.open("rb")
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}); check the file.") from error


def _bytes(stream: IO[bytes], path: Path) -> Iterator[bytes]:
    """The lines of a stream, as bytes, newlines kept."""
    try:
        yield from stream
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(
            f"{path} cannot be read ({error}); the file is damaged or cut short."
        ) from error


def _decoded(data: bytes, where: str) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise _not_utf8(where) from error


def _not_utf8(where: str) -> InputError:
    return InputError(f"{where} is not UTF-8 text; convert it to UTF-8, with iconv for example.")
