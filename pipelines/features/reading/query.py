"""SQL over the tables of a feature build: queries read their files only and write none."""

from __future__ import annotations

import os
import re
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import duckdb
import pyarrow as pa

from sae_harvest.common.errors import InputError, RunError
from sae_harvest.pipelines.features.tables.folder import (
    ADDED,
    FIRINGS,
    TABLES,
    check_tables,
    firing_files,
    require_run,
)

PATTERN = frozenset("*?[")  # DuckDB treats a path with these as a pattern for several files
OPEN_FOLDERS = "/proc/self/fd"
ROWS_AT_ONCE = 4096


def connect(features: Path) -> duckdb.DuckDBPyConnection:
    """Open an in-memory DuckDB with views of each table, all firings, and added tables.

    Raises:
        RunError: the folder holds no finished tables, or one of them is missing or damaged.
    """
    return _open(features)[0]


def connect_fenced(features: Path, **settings: str) -> duckdb.DuckDBPyConnection:
    """Do `connect` in isolation: without other files, network, extensions or Python variables.

    No query can undo that. DuckDB may also write the files that it may read, so run only statements
    that `only_select` accepts.

    Args:
        settings: more settings of DuckDB, such as `memory_limit`.

    Raises:
        RunError: as `connect`.
    """
    connection, paths = _open(features)
    for name, value in settings.items():
        connection.execute(f"SET {name} = {_literal(value)}")
    connection.execute(f"SET allowed_paths = {_literals(paths)}")
    for setting in (
        "python_enable_replacements = false",
        "autoinstall_known_extensions = false",
        "autoload_known_extensions = false",
        "enable_external_access = false",
        "lock_configuration = true",
    ):
        connection.execute(f"SET {setting}")
    return connection


@contextmanager
def reading(features: Path) -> Iterator[None]:
    """Report an error of DuckDB in this block as damaged tables: `RunError`."""
    try:
        yield
    except duckdb.Error as error:
        raise RunError(
            f"{features} cannot be read ({first_line(error)}); build the tables again."
        ) from error


def only_select(connection: duckdb.DuckDBPyConnection, sql: str) -> duckdb.Statement:
    """Parse a query that must be one SELECT.

    Raises:
        InputError: it is empty, not a SELECT, or several statements.
        duckdb.Error: DuckDB does not understand it.
    """
    statements = connection.extract_statements(sql)
    if not statements:
        raise InputError("The query is empty; write one such as SELECT * FROM latents.")
    if len(statements) != 1 or statements[0].type != duckdb.StatementType.SELECT:
        raise InputError("A query must be one SELECT, which only reads; leave out everything else.")
    return statements[0]


@dataclass(frozen=True)
class Question:
    """One SELECT, not run yet."""

    connection: duckdb.DuckDBPyConnection
    sql: str

    def rows(self, limit: int | None) -> tuple[list[str], Iterator[tuple[Any, ...]]]:
        """Return the names of the columns, and at most `limit` rows."""
        result = self.connection.execute(self.sql)
        columns = [column[0] for column in result.description or []]
        return columns, islice(self._rows(result), limit)

    def arrow(self) -> pa.RecordBatchReader:
        """Return the rows in DuckDB's types."""
        return self.connection.sql(self.sql).to_arrow_reader(ROWS_AT_ONCE)

    def _rows(self, result: duckdb.DuckDBPyConnection) -> Iterator[tuple[Any, ...]]:
        try:
            while rows := result.fetchmany(ROWS_AT_ONCE):
                yield from rows
        except (ValueError, OverflowError) as error:  # Python has no dates before the year 1
            raise InputError(
                f"The result cannot be shown ({error}); cast it to VARCHAR."
            ) from error


@contextmanager
def asked(features: Path, sql: str) -> Iterator[Question]:
    """Prepare a query over the tables in a folder, to run while this block is open.

    Raises:
        InputError: the query fails, here or in the block.
        RunError: as `connect`.
    """
    # private folder for DuckDB's temporary files of large sorts
    with TemporaryDirectory(prefix="sae-features-") as spilled:
        connection = connect_fenced(features, temp_directory=spilled)
        try:
            sql.encode()
            only_select(connection, sql)
            yield Question(connection, sql)
        except duckdb.PermissionException as error:
            raise InputError(
                f"A query reads the tables in {features} and no other file, and it writes none "
                f"({first_line(error)}); --output writes its result, and DuckDB itself joins files."
            ) from error
        except duckdb.Error as error:
            raise InputError(
                f"DuckDB cannot run this query ({first_line(error)}); "
                f"the tables are {', '.join((*TABLES, FIRINGS))}."
            ) from error
        except UnicodeEncodeError:
            raise InputError("The query is not UTF-8; type it again.") from None
        finally:
            connection.close()


def first_line(error: Exception) -> str:
    """Return DuckDB's message without its display of the query."""
    text = str(error).split("\n\n")[0].replace("\n", " ").strip()
    return re.sub(rf"{OPEN_FOLDERS}/\d+/", "", text)


def _open(features: Path) -> tuple[duckdb.DuckDBPyConnection, list[str]]:
    """Return a connection with its views, and the paths of all their files."""
    require_run(features)
    check_tables(features)
    files = {name: [f"{name}.parquet"] for name in TABLES}
    files[FIRINGS] = [f"{FIRINGS}/{path.name}" for path in firing_files(features)]
    files |= {n: [f"{n}.parquet"] for n in ADDED if (features / f"{n}.parquet").is_file()}
    connection = duckdb.connect()
    folder = _exact(connection, features)
    for name, some in files.items():
        paths = _literals(f"{folder}/{file}" for file in some)
        try:
            connection.execute(
                # a folder named layer=12 is not a column
                f"CREATE VIEW {name} AS FROM read_parquet({paths}, hive_partitioning = false)"
            )
        except duckdb.Error as error:
            raise RunError(
                f"{features / some[0]} is damaged ({first_line(error)}); "
                f"remove {features} and build again."
            ) from error
    return connection, [f"{folder}/{file}" for some in files.values() for file in some]


def _exact(connection: duckdb.DuckDBPyConnection, folder: Path) -> str:
    """Return a path of the folder that DuckDB cannot read as a pattern, while the folder is open.

    A name with characters of a pattern, or without UTF-8, is replaced by the kernel's name for the
    open folder. To escape the characters is not enough: DuckDB still lists the folders above, and
    fails at names that it cannot join, or without permission.
    """
    path = str(folder.absolute())
    if path.isprintable() and not PATTERN & set(path):
        return path
    if not Path(OPEN_FOLDERS).is_dir():
        raise InputError(f"DuckDB would read {path!a} as a pattern; rename the folder.")
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    weakref.finalize(connection, os.close, descriptor)
    return f"{OPEN_FOLDERS}/{descriptor}"


def _literals(texts: Iterable[str]) -> str:
    return f"[{', '.join(map(_literal, texts))}]"


def _literal(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"
