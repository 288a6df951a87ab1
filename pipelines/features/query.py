"""SQL over the tables of a feature build."""

from __future__ import annotations

from pathlib import Path

import duckdb

from pipelines.features.folder import FIRINGS, TABLES, check_tables, require_run
from store.errors import InputError, RunError


def connect(features: Path) -> duckdb.DuckDBPyConnection:
    """An in-memory DuckDB with one view per table, and one of all firings; files are only read.

    Raises:
        RunError: the folder holds no finished tables, or one of them is missing.
    """
    require_run(features)
    check_tables(features)
    connection = duckdb.connect()
    for name in (*TABLES, FIRINGS):
        path = features / (f"{FIRINGS}/*.parquet" if name == FIRINGS else f"{name}.parquet")
        literal = str(path.resolve()).replace("'", "''")
        try:
            connection.execute(f"CREATE VIEW {name} AS FROM read_parquet('{literal}')")
        except duckdb.Error as error:
            raise RunError(
                f"{path} is damaged ({first_line(error)}); remove {features} and build again."
            ) from error
    return connection


def query(features: Path, sql: str, limit: int) -> tuple[list[str], list[tuple[object, ...]], bool]:
    """Column names, at most `limit` rows, and whether there were more.

    Raises:
        InputError: DuckDB does not understand the query.
    """
    connection = connect(features)
    try:
        if not connection.extract_statements(sql):
            raise InputError("The query is empty; write one such as SELECT * FROM latents.")
        result = connection.execute(sql)
        rows = result.fetchmany(limit + 1)
    except duckdb.Error as error:
        raise InputError(
            f"DuckDB cannot run this query ({first_line(error)}); "
            f"the tables are {', '.join((*TABLES, FIRINGS))}."
        ) from error
    columns = [column[0] for column in result.description or []]
    return columns, rows[:limit], len(rows) > limit


def first_line(error: Exception) -> str:
    """DuckDB's message without its drawing of the query."""
    return str(error).split("\n\n")[0].replace("\n", " ").strip()
