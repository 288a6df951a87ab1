"""Files to rows: JSON lines and arrays, CSV and Parquet, a few rows at a time; plain text whole.

Reading can continue from any place in a file: by seeking if it is not compressed, by row group in
Parquet, otherwise by reading and skipping. Each fault of a file raises one InputError that names
the file and the place in it. No document may be larger than `MAX_DOCUMENT_BYTES`, so that a file
without line ends, or one that decompresses endlessly, cannot fill the memory.
"""

from __future__ import annotations

import csv
import io
import json
import sys
import zlib
from collections.abc import Callable, Iterator
from typing import IO, NamedTuple

from sae_harvest.common.errors import InputError
from sae_harvest.common.parsing import first_line
from sae_harvest.harvest.text.documents import Row
from sae_harvest.harvest.text.inputs import COMPRESSED, TextFile, file_format, opened, unreadable
from sae_harvest.harvest.text.jsonarrays import array_values

BLOCK_BYTES = 8 << 20
MAX_DOCUMENT_BYTES = 256 << 20  # needs up to 2 GB of memory during parsing

Selection = Callable[[tuple[str, ...]], list[str]]  # maps a file's columns to the columns to read


class Place(NamedTuple):
    """A place in a file where reading continues."""

    rows: int = 0
    """Rows before it."""
    lines: int = 0
    """Lines before it; counted in JSON lines only."""
    offset: int = 0
    """Uncompressed bytes before it; counted in JSON lines only."""


def read_text(file: TextFile) -> str:
    """Read a whole text file; newlines are not changed."""
    blocks, size = [], 0
    with opened(file) as stream:
        try:
            while block := stream.read(BLOCK_BYTES):
                blocks.append(block)
                size += len(block)
                if size > MAX_DOCUMENT_BYTES:
                    raise too_large(f"{file.where}, which is one document,")
        except (OSError, EOFError, zlib.error) as error:
            raise unreadable(file.where, error) from error
        return _decoded(b"".join(blocks), file.where)


def read_rows(file: TextFile, start: Place, columns: Selection) -> Iterator[tuple[str, Row, Place]]:
    """Yield rows of a JSON, CSV or Parquet file from a place on.

    Each row comes with its name for messages and the place after it. In Parquet files, only the
    columns that `columns` selects are read.
    """
    kind = file_format(file.where)
    if kind == ".parquet":
        from sae_harvest.harvest.text.parquetfiles import parquet_rows

        return ((label, row, Place(n)) for label, row, n in parquet_rows(file, start.rows, columns))
    if kind == ".csv":
        return _csv_file_rows(file, start.rows)
    if kind == ".json" and _begins_an_array(file):
        return _array_rows(file, start.rows)
    return _json_rows(file, start)


def _begins_an_array(file: TextFile) -> bool:
    """True if the first character of a JSON file, after white space, is a bracket."""
    with opened(file) as stream:
        try:
            head = stream.read(BLOCK_BYTES)
        except (OSError, EOFError, zlib.error) as error:
            raise unreadable(file.where, error) from error
    return head.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"[")


def _array_rows(file: TextFile, start: int) -> Iterator[tuple[str, Row, Place]]:
    number = 0
    with opened(file) as stream:
        try:
            for row in array_values(stream, MAX_DOCUMENT_BYTES):
                number += 1
                if number > start:
                    yield f"element {number}", row, Place(number)
        except UnicodeDecodeError as error:
            raise _not_utf8(file.where) from error
        except ValueError as error:
            raise InputError(
                f"{file.where}, element {number + 1}, is not JSON ({first_line(error)}); expected "
                "an array of objects, or one object a line."
            ) from error
        except (OSError, EOFError, zlib.error) as error:
            raise unreadable(file.where, error) from error


def _json_rows(file: TextFile, start: Place) -> Iterator[tuple[str, Row, Place]]:
    rows, lines, offset = start
    blank = 0
    with opened(file) as stream:
        _skip(stream, file, offset)
        for number, line in enumerate(_lines(stream, file, lines + 1), start=lines + 1):
            offset += len(line)
            label = f"line {number}"
            text = _decoded(line, f"{file.where}, {label}")
            if not text or text.isspace():
                blank += len(line)
                if blank > MAX_DOCUMENT_BYTES:
                    raise too_large(f"{file.where}, before line {number},", "blank lines")
                continue
            blank = 0
            try:
                row = json.loads(text)
            except RecursionError as error:
                raise _not_json(file.where, label, "it is nested too deeply") from error
            except ValueError as error:
                raise _not_json(file.where, label, first_line(error)) from error
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
    """Yield rows of comma-separated UTF-8 with a header; `where` names the stream in errors."""
    csv.field_size_limit(sys.maxsize)  # the module's own limit, 128 KiB, is too small for documents
    text = io.TextIOWrapper(stream, "utf-8-sig", newline="")
    size = 0  # characters since the last row

    def lines() -> Iterator[str]:
        nonlocal size
        while line := text.readline(MAX_DOCUMENT_BYTES + 1):
            size += len(line)
            if size > MAX_DOCUMENT_BYTES:
                raise too_large(f"{where}, near line {reader.line_num + 1},", "one row")
            yield line

    reader = csv.DictReader(lines())
    try:
        for row in reader:
            row.pop(None, None)  # fields past the header's end
            yield row
            size = 0
    except UnicodeDecodeError as error:
        raise _not_utf8(where) from error
    except (csv.Error, OSError, EOFError, zlib.error) as error:
        raise InputError(
            f"{where} cannot be read as CSV near line {reader.line_num} ({error}); expected "
            "comma-separated values with a header."
        ) from error


def _skip(stream: IO[bytes], file: TextFile, n_bytes: int) -> None:
    """Skip `n_bytes` bytes: by seeking, or by reading if the stream is compressed."""
    try:
        if not file.where.lower().endswith(COMPRESSED):
            stream.seek(n_bytes)
            return
        while n_bytes and (block := stream.read(min(n_bytes, BLOCK_BYTES))):
            n_bytes -= len(block)
    except (OSError, EOFError, zlib.error) as error:
        raise unreadable(file.where, error) from error


def _lines(stream: IO[bytes], file: TextFile, first: int) -> Iterator[bytes]:
    """Yield the lines of a stream as bytes, with newlines; `first` is the number of the first."""
    number = first
    try:
        while line := stream.readline(MAX_DOCUMENT_BYTES + 1):
            if len(line) > MAX_DOCUMENT_BYTES:
                raise too_large(f"{file.where}, line {number},")
            yield line
            number += 1
    except (OSError, EOFError, zlib.error) as error:
        raise unreadable(file.where, error) from error


def _decoded(data: bytes, where: str) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise _not_utf8(where) from error


def _not_utf8(where: str) -> InputError:
    return InputError(f"{where} is not UTF-8 text; convert it to UTF-8, with iconv for example.")


def _not_json(where: str, label: str, why: str) -> InputError:
    return InputError(f"{where}, {label}, is not JSON ({why}); expected one object a line.")


def too_large(what: str, unit: str = "one document") -> InputError:
    return InputError(
        f"{what} has more than {MAX_DOCUMENT_BYTES >> 20} MiB in {unit}, the most that is read "
        "into memory; split it into smaller documents."
    )
