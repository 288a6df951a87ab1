"""Rows of a Parquet file, a batch at a time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pyarrow.types as kinds
from pyarrow import parquet

from harvest.documents import Row
from harvest.inputs import TextFile, opened
from harvest.textfiles import BLOCK_BYTES, MAX_DOCUMENT_BYTES, Columns, too_large
from store.errors import InputError
from store.parsing import first_line

_BATCH_ROWS = 256
_BATCH_BYTES = 16 << 20


def parquet_rows(file: TextFile, start: int, columns: Columns) -> Iterator[tuple[str, Row, int]]:
    """Rows after the first `start`, each with its name in messages and its number from 1."""
    number, begun = start, 0
    try:
        with opened(file) as stream, parquet.ParquetFile(stream) as head:
            names = columns(tuple(head.schema_arrow.names))
            # A value that is repeated is kept once in the file; it is kept once in memory as well.
            repeated = [name for name in names if _is_text(head.schema_arrow.field(name).type)]
            table = parquet.ParquetFile(
                stream,
                metadata=head.metadata,
                buffer_size=BLOCK_BYTES,
                read_dictionary=repeated,
            )
            for index in range(table.num_row_groups):
                group = table.metadata.row_group(index)
                first, begun = begun, begun + group.num_rows
                if begun <= start or not group.num_rows:
                    continue
                row_bytes = max(1, group.total_byte_size // group.num_rows)
                size = min(_BATCH_ROWS, max(1, _BATCH_BYTES // row_bytes))
                for batch in table.iter_batches(size, row_groups=[index], columns=names):
                    skipped = min(max(0, start - first), len(batch))
                    first += len(batch)
                    for place in range(skipped, len(batch)):
                        number += 1
                        label = f"row {number}"
                        row = {
                            name: _value(column[place], f"{file.where}, {label},")
                            for name, column in zip(batch.schema.names, batch.columns, strict=True)
                        }
                        yield label, row, number
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"{file.where} cannot be read as Parquet after row {number} ({first_line(error)}); "
            "expected a complete .parquet file."
        ) from error


def _is_text(kind: pa.DataType) -> bool:
    return kinds.is_string(kind) or kinds.is_binary(kind)


def _value(cell: Any, where: str) -> Any:
    if isinstance(cell, pa.DictionaryScalar):
        cell = cell.value
    if isinstance(cell, pa.BinaryScalar):
        data = cell.as_buffer()
        if data is not None and data.size > MAX_DOCUMENT_BYTES:
            raise too_large(where)
    return cell.as_py()
