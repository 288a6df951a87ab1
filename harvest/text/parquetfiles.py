"""Rows of a Parquet file, a batch at a time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import pyarrow as pa
import pyarrow.types as kinds
from pyarrow import compute, parquet

from sae_harvest.common.errors import InputError
from sae_harvest.common.parsing import first_line
from sae_harvest.harvest.text.documents import Row
from sae_harvest.harvest.text.inputs import TextFile, opened
from sae_harvest.harvest.text.textfiles import (
    BLOCK_BYTES,
    MAX_DOCUMENT_BYTES,
    Selection,
    too_large,
)

TEXT_KINDS = (
    *(kinds.is_string, kinds.is_large_string, kinds.is_string_view),
    *(kinds.is_binary, kinds.is_large_binary, kinds.is_binary_view),
)

_BATCH_ROWS = 256
_BATCH_BYTES = 16 << 20


def parquet_rows(file: TextFile, start: int, columns: Selection) -> Iterator[tuple[str, Row, int]]:
    """Yield rows after the first `start`, each with its name for messages and its number from 1."""
    number, group_stop = start, 0
    try:
        with opened(file) as stream, parquet.ParquetFile(stream) as head:
            names = columns(tuple(head.schema_arrow.names))
            # The file stores a repeated value once; so does memory.
            repeated = [name for name in names if _is_text(head.schema_arrow.field(name).type)]
            table = parquet.ParquetFile(
                stream,
                metadata=head.metadata,
                buffer_size=BLOCK_BYTES,
                read_dictionary=repeated,
            )
            for index in range(table.num_row_groups):
                group = table.metadata.row_group(index)
                first, group_stop = group_stop, group_stop + group.num_rows
                if group_stop <= start or not group.num_rows:
                    continue
                row_bytes = max(1, group.total_byte_size // group.num_rows)
                size = min(_BATCH_ROWS, max(1, _BATCH_BYTES // row_bytes))
                for batch in table.iter_batches(size, row_groups=[index], columns=names):
                    rest = batch.slice(min(max(0, start - first), len(batch)))
                    first += len(batch)
                    columns_of = [_values(column, file.where, number) for column in rest.columns]
                    for cells in zip(*columns_of, strict=True):
                        number += 1
                        row = dict(zip(rest.schema.names, cells, strict=True))
                        yield f"row {number}", row, number
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"{file.where} cannot be read as Parquet after row {number} ({first_line(error)}); "
            "expected a complete .parquet file."
        ) from error


def _is_text(kind: pa.DataType) -> bool:
    return any(is_kind(kind) for is_kind in TEXT_KINDS)


def _values(column: Any, where: str, before: int) -> Iterable[Any]:
    """Return the cells of a column, at once, or one by one if they are large.

    Args:
        before: number of the row before the first one.
    """
    if not isinstance(column, pa.DictionaryArray) or not _is_text(column.dictionary.type):
        return column.to_pylist()
    lengths = compute.binary_length(column.dictionary).take(column.indices)
    if (compute.sum(lengths).as_py() or 0) <= _BATCH_BYTES:
        return column.dictionary.take(column.indices).to_pylist()
    return _one_by_one(column, where, before)


def _one_by_one(column: Any, where: str, before: int) -> Iterator[Any]:
    for number, cell in enumerate(column, start=before + 1):
        data = cell.value.as_buffer()
        if data is not None and data.size > MAX_DOCUMENT_BYTES:
            raise too_large(f"{where}, row {number},")
        yield cell.as_py()
