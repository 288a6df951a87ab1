"""Binary tasks: what is to be told apart, as labels of texts, documents or rows.

A task is a Parquet file with a column `label` (bool) and one of these columns:

    text        string: the text of a document, exactly as it was harvested
    document    integer: number of a document in the store
    row         integer: number of a row in the store

The name of the file, without its ending, is the name of the task.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import pyarrow.types as kinds
import xxhash

from sae_harvest.common.errors import InputError
from sae_harvest.common.parsing import first_line

Key = Literal["text", "document", "row"]
KEYS: tuple[Key, ...] = ("text", "document", "row")
LABEL = "label"


@dataclass(frozen=True, eq=False)
class Task:
    """A binary task."""

    name: str
    """Name of the task."""

    key: Key
    """Keys of the labelled examples."""

    keys: npt.NDArray[Any]
    """Hashes of texts (xxh3-64), uint64; or numbers of documents or rows, int64 [labels]."""

    labels: npt.NDArray[np.bool_]
    """bool [labels]."""

    @property
    def unit(self) -> Literal["documents", "rows"]:
        """Unit of the examples: rows or documents."""
        return "rows" if self.key == "row" else "documents"


def text_hashes(texts: list[str]) -> npt.NDArray[np.uint64]:
    """Return the xxh3-64 of each text's UTF-8, as a store holds it."""
    return np.array([xxhash.xxh3_64_intdigest(text.encode()) for text in texts], np.uint64)


def read_tasks(place: Path) -> list[Task]:
    """Read a task, or every `.parquet` file of a folder in the order of their names.

    Raises:
        InputError: there is no task, or a file is not one; the message names it.
    """
    if not place.is_dir():
        return [read_task(place)]
    paths = sorted(place.glob("*.parquet"))
    if not paths:
        raise InputError(f"{place} holds no task; put files NAME.parquet there.")
    return [read_task(path) for path in paths]


def read_task(path: Path) -> Task:
    """Read a task.

    Raises:
        InputError: the file is missing or damaged, a column is missing or has the wrong type, a
            value is missing, a key has two labels, or there is only one class.
    """
    try:
        table = pq.read_table(path)
    except (OSError, pa.ArrowException) as error:
        raise InputError(
            f"The task {path} cannot be read ({first_line(error)}); give a Parquet file."
        ) from None
    key = _key_column(path, table)
    if not kinds.is_boolean(table.schema.field(LABEL).type):
        raise InputError(
            f"The task {path} has labels of type {table.schema.field(LABEL).type}; expected bool."
        )
    for name in (LABEL, key):
        if table[name].null_count:
            raise InputError(f"The task {path} has an empty {name}; give every row both columns.")
    labels = table[LABEL].to_numpy().astype(np.bool_)
    found = Task(path.stem, key, _keys(path, table[key], key), labels)
    _check_labels(path, found)
    return found


def _key_column(path: Path, table: pa.Table) -> Key:
    if LABEL not in table.column_names:
        raise InputError(
            f"The task {path} has no column {LABEL}; it has {', '.join(table.column_names)}."
        )
    found = [key for key in KEYS if key in table.column_names]
    if len(found) != 1:
        raise InputError(
            f"The task {path} has {' and '.join(found) or 'none'} of the columns "
            f"{', '.join(KEYS)}; expected exactly one."
        )
    return found[0]


def _keys(path: Path, column: pa.ChunkedArray, key: Key) -> npt.NDArray[Any]:
    if key == "text":
        if not (kinds.is_string(column.type) or kinds.is_large_string(column.type)):
            raise InputError(f"The task {path} has texts of type {column.type}; expected string.")
        return text_hashes(column.to_pylist())
    if not kinds.is_integer(column.type):
        raise InputError(f"The task {path} has {key}s of type {column.type}; expected integers.")
    return column.to_numpy().astype(np.int64)


def _check_labels(path: Path, task: Task) -> None:
    """Raise `InputError` for a key with two labels, or if there is only one class."""
    order = np.lexsort((task.labels, task.keys))
    keys, labels = task.keys[order], task.labels[order]
    if ((keys[1:] == keys[:-1]) & (labels[1:] != labels[:-1])).any():
        raise InputError(f"The task {path} gives one {task.key} two labels; remove one of them.")
    if labels.all() or not labels.any():
        count = f"{len(labels):,} labels, all {bool(labels.all())}" if len(labels) else "no label"
        raise InputError(f"The task {path} has {count}; expected both classes.")
