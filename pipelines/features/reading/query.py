"""SQL over the tables of a feature build: their files are read, no others, and none is written."""

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
    EXPLANATIONS,
    FIRINGS,
    TABLES,
    check_tables,
    firing_files,
    require_run,
)

PATTERN = frozenset("*?[")  # in a path, DuckDB looks for other files by them
OPEN_FOLDERS = "/proc/self/fd"
ROWS_AT_ONCE = 4096


def connect(features: Path) -> duckdb.DuckDBPyConnection:
    """An in-memory DuckDB with a view of each table, of all firings, and of added explanations.

    Raises:
        RunError: the folder holds no finished tables, or one of them is missing or damaged.
    """
    return _open(features)[0]


def connect_fenced(features: Path, **settings: str) -> duckdb.DuckDBPyConnection:
    """`connect`, with no way out: no other file, network, extension or variable of this process.

    No query can undo that. What DuckDB may read it may also write: give it no statement but those
    that `only_select` lets through.

    Args:
        settings: more of DuckDB's, `memory_limit` say.

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
    """Within, an error of DuckDB's means tables that are damaged: `RunError`."""
    try:
        yield
    except duckdb.Error as error:
        raise RunError(
            f"{features} cannot be read ({first_line(error)}); build the tables again."
        ) from error


def only_select(connection: duckdb.DuckDBPyConnection, sql: str) -> duckdb.Statement:
    """The one SELECT that a query is.

    Raises:
        InputError: it is empty, or something else, or several.
        duckdb.Error: DuckDB does not understand it.
    """
    statements = connection.extract_statements(sql)
    if not statements:
        raise InputError("The query is empty; write one such as SELECT * FROM latents.")
    if len(statements) != 1 or statements[0].type != duckdb.StatementType.SELECT:
        raise InputError("A query is one SELECT, which only reads; leave out everything else.")
    return statements[0]


@dataclass(frozen=True)
class Question:
    """One SELECT, not run yet."""

    connection: duckdb.DuckDBPyConnection
    sql: str

    def rows(self, limit: int | None) -> tuple[list[str], Iterator[tuple[Any, ...]]]:
        """Names of the columns, and the rows, at most so many."""
        result = self.connection.execute(self.sql)
        columns = [column[0] for column in result.description or []]
        return columns, islice(self._rows(result), limit)

    def arrow(self) -> pa.RecordBatchReader:
        """The rows in DuckDB's types."""
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
    """A query to the tables in a folder, to be answered while this is open.

    Raises:
        InputError: the query cannot be answered, here or within.
        RunError: as `connect`.
    """
    # what a large sort cannot keep in memory is nobody's but DuckDB's
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
    """DuckDB's message without its drawing of the query."""
    text = str(error).split("\n\n")[0].replace("\n", " ").strip()
    return re.sub(rf"{OPEN_FOLDERS}/\d+/", "", text)


def _open(features: Path) -> tuple[duckdb.DuckDBPyConnection, list[str]]:
    """A connection with its views, and the paths of all files behind them."""
    require_run(features)
    check_tables(features)
    files = {name: [f"{name}.parquet"] for name in TABLES}
    files[FIRINGS] = [f"{FIRINGS}/{path.name}" for path in firing_files(features)]
    if (features / f"{EXPLANATIONS}.parquet").is_file():
        files[EXPLANATIONS] = [f"{EXPLANATIONS}.parquet"]
    connection = duckdb.connect()
    folder = _exact(connection, features)
    for name, some in files.items():
        paths = _literals(f"{folder}/{file}" for file in some)
        try:
            connection.execute(
                # a folder called layer=12 is not a column
                f"CREATE VIEW {name} AS FROM read_parquet({paths}, hive_partitioning = false)"
            )
        except duckdb.Error as error:
            raise RunError(
                f"{features / some[0]} is damaged ({first_line(error)}); "
                f"remove {features} and build again."
            ) from error
    return connection, [f"{folder}/{file}" for some in files.values() for file in some]


def _exact(connection: duckdb.DuckDBPyConnection, folder: Path) -> str:
    """A path of the folder that DuckDB takes for this one and no other, as long as it is open.

    Names with letters of a pattern, or without UTF-8, are replaced by the kernel's name for the
    open folder. To escape the letters is not enough: DuckDB still lists the folders above, and
    fails where it finds a name that it cannot join, or may not look.
    """
    path = str(folder.absolute())
    if path.isprintable() and not PATTERN & set(path):
        return path
    if not Path(OPEN_FOLDERS).is_dir():
        raise InputError(f"DuckDB would take {path!a} for a pattern; rename the folder.")
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    weakref.finalize(connection, os.close, descriptor)
    return f"{OPEN_FOLDERS}/{descriptor}"


def _literals(texts: Iterable[str]) -> str:
    return f"[{', '.join(map(_literal, texts))}]"


def _literal(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"
