"""SELECT from a page, over these tables only, with limits of memory, time and result.

Each query has its own process (`sqlworker.py`), which starts in half a second and which the system
kills at the deadline. One query runs at a time, so the memory limit holds for the whole server.
"""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

from sae_harvest.common.errors import InputError
from sae_harvest.pipelines.features.reading.query import first_line
from sae_harvest.pipelines.features.tables.folder import check_tables, require_run
from sae_harvest.pipelines.viewer import sqlworker
from sae_harvest.pipelines.viewer.models import BusyError

SQL_ROWS, SQL_SECONDS, SQL_MEMORY = 200, 10.0, 10**9
MAX_SQL_CHARS = 10_000
START_SECONDS = 10.0  # allowance for the start of the process on a busy machine


class FencedSQL:
    """SELECTs over the tables of one folder and nothing else.

    A query cannot reach other files, the network, extensions or variables of this process. It
    cannot write to disk, and it cannot lift these limits.

    Args:
        seconds: time limit of a query.
        memory: memory limit of a query, in bytes.
    """

    def __init__(
        self, features: Path, seconds: float = SQL_SECONDS, memory: int = SQL_MEMORY
    ) -> None:
        require_run(features)
        check_tables(features)
        self._features, self._seconds, self._memory = features.resolve(), seconds, memory
        self._turn = threading.Lock()

    def select(self, sql: str) -> dict[str, Any]:
        """Return `columns`, at most `SQL_ROWS` `rows`, and `more`, whether there were more rows.

        Raises:
            InputError: the query is not one SELECT, not valid, not allowed, too slow or too large.
            BusyError: another query is running.
        """
        if len(sql) > MAX_SQL_CHARS:
            raise InputError(f"A query has at most {MAX_SQL_CHARS:,} characters.")
        if not self._turn.acquire(blocking=False):
            raise BusyError("Another query is running; try again in a moment.")
        try:
            answer = self._ask(sql)
        finally:
            self._turn.release()
        if (fault := answer.get("fault")) is not None:
            raise InputError(self._sentence(fault, answer["text"]))
        return answer

    def _ask(self, sql: str) -> dict[str, Any]:
        """Run the query in its own process and return the answer."""
        request = {
            "sql": sql,
            "features": str(self._features),
            "rows": SQL_ROWS,
            "memory": self._memory,
            "seconds": self._seconds,
        }
        try:
            process = subprocess.run(
                [sys.executable, "-P", "-m", sqlworker.__name__],
                input=json.dumps(request).encode(),
                capture_output=True,
                timeout=self._seconds + START_SECONDS,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return {"fault": "time", "text": ""}
        if process.returncode == -sqlworker.DEADLINE:
            return {"fault": "time", "text": ""}
        if process.returncode < 0:  # killed by the system, or aborted when it got no memory
            return {"fault": sqlworker.MEMORY, "text": ""}
        if process.returncode:
            raise RuntimeError(process.stderr.decode(errors="replace"))
        answer: dict[str, Any] = json.loads(process.stdout)
        return answer

    def _sentence(self, fault: str, text: str) -> str:
        return {
            "time": f"The query took longer than {self._seconds:g} s and was stopped; add a WHERE.",
            sqlworker.MEMORY: f"The query needs more than {self._memory / 1e9:g} GB of memory; "
            "select fewer rows or columns.",
            sqlworker.RESULT: f"The result has {text} bytes, more than "
            f"{sqlworker.MAX_ANSWER_BYTES:,}; select fewer columns.",
            sqlworker.SAID: text,
            sqlworker.VALUE: f"The result cannot be shown ({text}); cast it to VARCHAR.",
            sqlworker.DUCKDB: f"DuckDB refuses the query ({first_line(Exception(text))}).",
        }[fault]
