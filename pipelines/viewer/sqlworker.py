"""A process that answers one SELECT over the tables.

It runs as `python -m sae_harvest.pipelines.viewer.sqlworker`, reads a request from standard input
and writes its answer to standard output, each one JSON object. DuckDB's own limits cover most of
its memory but not all, and some of its functions cannot be interrupted. So the system limits the
process: its memory by RLIMIT_AS, its time by an alarm that kills it, its files by RLIMIT_FSIZE.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
from pathlib import Path
from typing import Any

import duckdb

from sae_harvest.common.errors import SaeHarvestError
from sae_harvest.pipelines.features.reading.query import connect_fenced, only_select
from sae_harvest.pipelines.viewer.tables import plain

MAX_CELL_CHARS = 2_000  # characters of a value shown
MAX_ANSWER_BYTES = 4_000_000  # bytes of JSON
DEADLINE = signal.SIGALRM  # kills the process at its time limit
MEMORY, RESULT, VALUE, DUCKDB, SAID = "memory", "result", "value", "duckdb", "said"


def main() -> None:
    """Answer the request on standard input."""
    request = json.load(sys.stdin.buffer)
    confine(request["memory"], request["seconds"])
    try:
        answer = answered(request)
        text = json.dumps(answer, allow_nan=False).encode()
    except MemoryError:
        text = _fault(MEMORY, "")
    if len(text) > MAX_ANSWER_BYTES:
        text = _fault(RESULT, f"{len(text):,}")
    sys.stdout.buffer.write(text)
    sys.stdout.buffer.flush()
    os._exit(0)  # skips the cleanup: freeing a gigabyte takes time


def answered(request: dict[str, Any]) -> dict[str, Any]:
    """Return `columns`, `rows` and `more`, or `fault` (one of the words above) and `text`."""
    try:
        memory = f"{request['memory'] * 8 // 10}B"
        connection = connect_fenced(
            Path(request["features"]), memory_limit=memory, temp_directory="", threads="2"
        )
        return select(connection, request["sql"], request["rows"])
    except duckdb.OutOfMemoryException:
        return {"fault": MEMORY, "text": ""}
    except duckdb.Error as error:
        return {"fault": DUCKDB, "text": str(error)[:5000]}
    except SaeHarvestError as error:
        return {"fault": SAID, "text": str(error)}
    except (ValueError, RuntimeError) as error:  # a value that has no Python type
        return {"fault": VALUE, "text": str(error)[:300]}


def confine(memory: int, seconds: float) -> None:
    """Limit this process to `memory` more bytes than now, and to `seconds` from now."""
    signal.signal(DEADLINE, signal.SIG_DFL)  # the default action kills the process at once
    signal.setitimer(signal.ITIMER_REAL, seconds)
    with open("/proc/self/statm") as file:  # noqa: PTH123
        now = int(file.read().split()[0]) * resource.getpagesize()
    for limit, value in (
        (resource.RLIMIT_AS, now + memory),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(limit, (value, value))


def select(connection: duckdb.DuckDBPyConnection, sql: str, n_rows: int) -> dict[str, Any]:
    """Return `columns`, at most `n_rows` `rows`, and `more`, whether there are more rows.

    Raises:
        InputError: the query is not one SELECT.
        duckdb.Error: DuckDB cannot answer it.
    """
    result = connection.execute(only_select(connection, sql))
    columns = [column[0] for column in result.description or []]
    rows = result.fetchmany(n_rows + 1)
    return {
        "columns": columns,
        "rows": [[cell(value) for value in row] for row in rows[:n_rows]],
        "more": len(rows) > n_rows,
    }


def cell(value: object) -> Any:
    """Return a value of a result for JSON: numbers unchanged, other values as text, cut if long."""
    value = plain(value)
    if value is None or isinstance(value, bool | float):
        return value
    if isinstance(value, int):
        return value if abs(value) < 2**63 else str(value)
    if isinstance(value, list) and all(isinstance(v, int | float) for v in value):
        text = ", ".join(map(str, value))
    else:
        text = value if isinstance(value, str) else str(value)
    return text if len(text) <= MAX_CELL_CHARS else text[:MAX_CELL_CHARS] + " …"


def _fault(fault: str, text: str) -> bytes:
    return json.dumps({"fault": fault, "text": text}).encode()


if __name__ == "__main__":
    main()
