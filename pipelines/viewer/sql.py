"""SELECT typed into a page, fenced in: one statement, these tables, so many rows and seconds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import duckdb

from pipelines.features.query import connect_fenced, first_line
from pipelines.viewer.tables import limited, plain
from store.errors import InputError

SQL_ROWS, SQL_SECONDS, SQL_MEMORY = 200, 10.0, "1GB"
LONGEST_SQL = 10_000
LONGEST_CELL = 2_000  # characters of a value shown


class FencedSQL:
    """A DuckDB of its own that can read the tables' files and nothing else.

    Files, network, extensions and variables of this process are out of reach, memory is limited,
    nothing is written to disk, and none of that can be undone by a query.
    """

    def __init__(self, features: Path, seconds: float = SQL_SECONDS) -> None:
        self.seconds = seconds
        self._connection = connect_fenced(features, memory_limit=SQL_MEMORY, temp_directory="")

    def select(self, sql: str) -> dict[str, Any]:
        """columns, at most `SQL_ROWS` rows, and whether there were more.

        Raises:
            InputError: not one SELECT, not understood, not allowed, or too slow.
        """
        if len(sql) > LONGEST_SQL:
            raise InputError(f"A query has at most {LONGEST_SQL:,} characters.")
        cursor = self._connection.cursor()
        try:
            statements = cursor.extract_statements(sql)
            if len(statements) != 1 or statements[0].type != duckdb.StatementType.SELECT:
                raise InputError("Only one SELECT is answered here; leave out everything else.")
            with limited(cursor, self.seconds):
                result = cursor.execute(statements[0])
                columns = [column[0] for column in result.description or []]
                rows = result.fetchmany(SQL_ROWS + 1)
        except duckdb.InterruptException:
            raise InputError(
                f"The query took longer than {self.seconds:g} s and was stopped; add a WHERE."
            ) from None
        except duckdb.Error as error:
            raise InputError(f"DuckDB does not answer this ({first_line(error)}).") from error
        except ValueError as error:  # DuckDB hands over dates that Python has no words for
            raise InputError(
                f"The result cannot be shown ({error}); cast it to VARCHAR."
            ) from error
        finally:
            cursor.close()
        return {
            "columns": columns,
            "rows": [[_cell(value) for value in row] for row in rows[:SQL_ROWS]],
            "more": len(rows) > SQL_ROWS,
        }


def _cell(value: object) -> Any:
    """Numbers as they are, everything else as text that is not too long."""
    value = plain(value)
    if value is None or isinstance(value, bool | int | float):
        return value
    if isinstance(value, list) and all(isinstance(v, int | float) for v in value):
        text = ", ".join(map(str, value))
    else:
        text = value if isinstance(value, str) else str(value)
    return text if len(text) <= LONGEST_CELL else text[:LONGEST_CELL] + " …"
