"""The small tables of a shard, as Parquet: contexts, documents, rows of int8 stores kept exactly.

The hash of a table is checked before it is parsed. Its content is checked as well, since a table
may be unaltered and still wrong.
"""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from sae_harvest.common.errors import DamagedError
from sae_harvest.store.layout import Plan

PIECE_SCHEMA = pa.schema(
    {
        "context": pa.int64(),  # its number in the store
        # Positions in the context, half open. An end-of-text token belongs to the document before
        # it, a BOS to none.
        "start": pa.int32(),
        "stop": pa.int32(),
        "document": pa.int64(),
        "document_hash": pa.uint64(),  # xxh3-64 of the document's UTF-8 text
        "first_token": pa.int64(),  # index in the document of the token at `start`
        # Characters of the document, half open; empty at the document's end for a piece that is
        # only an end-of-text token. A character with bytes in two pieces is in both.
        "char_start": pa.int64(),
        "char_end": pa.int64(),
    }
)
DOCUMENT_SCHEMA = pa.schema(
    {
        # Its number among the documents with text, without duplicates if they are removed.
        "document": pa.int64(),
        "id": pa.string(),
        "source": pa.string(),
        "title": pa.string(),
        "url": pa.string(),
        "text_hash": pa.uint64(),
        "n_chars": pa.int64(),
        "n_tokens": pa.int64(),  # without the end-of-text token
    }
)
TEXT_FIELD = pa.field("text", pa.string())  # column of documents, if their text is kept
_NUMBERS = ("document", "text_hash", "n_chars", "n_tokens")


def exact_table(rows: npt.NDArray[np.int64], x: npt.NDArray[Any]) -> pa.Table:
    """Return the table of rows kept exactly: row int64, values float16 [width]."""
    flat = pa.array(np.ascontiguousarray(x, np.float16).reshape(-1))
    values = pa.FixedSizeListArray.from_arrays(flat, x.shape[1])
    return pa.table({"row": pa.array(rows, pa.int64()), "values": values})


def exact_values(table: pa.Table, width: int) -> npt.NDArray[np.float16]:
    """Return the values of an `exact_table`, [rows, width]."""
    return table["values"].combine_chunks().flatten().to_numpy().reshape(-1, width)


def encode_table(table: pa.Table) -> bytes:
    """Return the table as Parquet."""
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd", write_page_checksum=True)
    return sink.getvalue().to_pybytes()


def parse_table(data: bytes, plan: Plan, key: str, shard: int, name: str) -> pa.Table:
    """Return the table of a shard, from the bytes of its object.

    Args:
        key: key of the object; its folder says which table it is.
        name: name of the object in messages.

    Raises:
        DamagedError: it is not Parquet, has other columns, or has rows of other shards.
    """
    kind, _, rest = key.partition("/")
    try:
        table = pq.read_table(io.BytesIO(data))
        if kind == "contexts":
            fits = _are_pieces(table, plan, shard)
        elif kind == "documents":
            schema = DOCUMENT_SCHEMA.append(TEXT_FIELD) if plan.document_text else DOCUMENT_SCHEMA
            fits = table.schema == schema and not any(table[name].null_count for name in _NUMBERS)
        else:
            fits = _are_exact(table, plan, rest.rpartition("/")[0], shard)
    except (pa.ArrowException, OSError, KeyError):
        fits = False
    if not fits:
        raise DamagedError(f"{name} is damaged: it is not the table of this shard.")
    return table


def _are_pieces(table: pa.Table, plan: Plan, shard: int) -> bool:
    """True if pieces of documents lie in the contexts of the shard."""
    if table.schema != PIECE_SCHEMA or any(column.null_count for column in table.columns):
        return False
    first = shard * plan.contexts_per_shard
    context, start, stop = (table[name].to_numpy() for name in ("context", "start", "stop"))
    return bool(
        (context >= first).all()
        and (context < first + plan.contexts_per_shard).all()
        and (start >= 0).all()
        and (start <= stop).all()
        and (stop <= plan.context_length).all()
    )


def _are_exact(table: pa.Table, plan: Plan, site: str, shard: int) -> bool:
    """True if rows kept exactly are rows of the shard, ascending, each as wide as the site."""
    schema = exact_table(np.empty(0, np.int64), np.empty((0, plan.width(site)))).schema
    if table.schema != schema or any(column.null_count for column in table.columns):
        return False
    if table["values"].combine_chunks().flatten().null_count:
        return False
    rows = table["row"].to_numpy() - shard * plan.shard_rows
    return bool((np.diff(rows) > 0).all() and (rows >= 0).all() and (rows < plan.shard_rows).all())
