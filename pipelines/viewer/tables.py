"""The tables of a feature build, opened once for reading."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import duckdb

from sae_harvest.common.errors import InputError, RunError
from sae_harvest.pipelines.features.reading.query import connect, first_line
from sae_harvest.pipelines.features.tables.checks import require_tables
from sae_harvest.pipelines.features.tables.folder import (
    EXPLANATIONS,
    LABELS,
    PROGRAMS,
    SCORES,
    SIMULATIONS,
)

QUERY_SECONDS = 20.0
KEPT_DOCUMENTS = 1_000_000  # if there are more, titles are looked up in the file
LABEL_TOKENS = 6  # a latent's most frequent tokens that lists show
PROGRAM = "kind, program, rows, positives, f1, f1_low, f1_high, other_f1, always_f1"
SUMMARY = {
    "latent": "number of the latent in the SAE",
    "density": "share of rows on which it fires",
    "context_density": "share of contexts in which it fires",
    "n_fire": "number of rows on which it fires",
    "max": "its highest activation",
    "mean": "its mean activation on the rows on which it fires",
    "kurtosis": "kurtosis of its activations; 3 for a normal distribution",
    "bimodality": "bimodality of its activations; 0.56 if uniform, 1 for two values",
    "n_tokens": "number of different tokens it fires on",
    "token_entropy_bits": "entropy in bits of the tokens it fires on; 0 for a single token",
    "encoder_decoder_cosine": "cosine between its encoder row and its decoder row",
}


class Tables:
    """Tables of one folder.

    The columns that lists show and the titles of documents are held in memory, so that a latent's
    page reads only that latent's rows of the other tables.

    Raises:
        RunError: the folder holds no tables, or damaged tables.
    """

    def __init__(self, features: Path, seconds: float = QUERY_SECONDS) -> None:
        self.features = features.resolve()
        self.seconds = seconds
        self.run: dict[str, Any] = require_tables(features)
        self.has_explanations = (features / f"{EXPLANATIONS}.parquet").is_file()
        self.has_scores = self.has_explanations and all(
            (features / f"{name}.parquet").is_file() for name in (SCORES, SIMULATIONS)
        )
        self._chosen = ""  # condition for the explanations to show
        self.has_programs = (features / f"{PROGRAMS}.parquet").is_file()
        self._connection = connect(features)
        try:
            self._connection.execute(
                f"CREATE TABLE summary AS SELECT {', '.join(SUMMARY)}, dead, "
                f"top_tokens[1:{LABEL_TOKENS}] AS tokens, label FROM latents "
                f"LEFT JOIN {self._described()} USING (latent) ORDER BY latent"
            )
            count = self._connection.execute("SELECT count(*) FROM documents").fetchall()[0][0]
            kept = "TABLE" if count <= KEPT_DOCUMENTS else "VIEW"
            self._connection.execute(
                f"CREATE {kept} titles AS SELECT document, source, title, url FROM documents"
            )
        except duckdb.Error as error:
            raise RunError(
                f"{self.features} is damaged ({first_line(error)}); remove it and build again."
            ) from error
        if self.has_explanations and self._columns(EXPLANATIONS) >= {"chosen"}:
            self._chosen = "AND chosen"  # other candidates are in the table as well
        (counts,) = self.ask(
            "SELECT count(*) AS n, count(*) FILTER (NOT dead) AS live, "
            "round(max(n_fire / density) FILTER (density > 0))::BIGINT AS rows FROM summary"
        )
        self.n_latents: int = counts["n"]
        self.n_live: int = counts["live"]
        self.n_rows: int = counts["rows"] or 0  # rows read by the build; 0 if no latent fired

    @property
    def name(self) -> str:
        """Short name for display: the last two parts of the tables' path."""
        return "/".join(self.features.parts[-2:])

    def ask(self, sql: str, *values: object) -> list[dict[str, Any]]:
        """Run a query with a value for each `?`; see `ask_named`."""
        return self.ask_named(sql, list(values))

    def ask_named(self, sql: str, values: list[object] | dict[str, object]) -> list[dict[str, Any]]:
        """Run a query with a value for each `$name`; return rows of JSON values, None for NaN.

        Raises:
            InputError: the query took longer than the limit.
            RunError: a table is damaged.
        """
        cursor = self._connection.cursor()
        try:
            with limited(cursor, self.seconds):
                result = cursor.execute(sql, values)
                names = [column[0] for column in result.description or []]
                rows = result.fetchall()
        except duckdb.InterruptException:
            raise InputError(
                f"The query took longer than {self.seconds:g} s and was stopped; "
                "search for something more specific."
            ) from None
        except (duckdb.Error, UnicodeDecodeError) as error:
            raise RunError(
                f"{self.features} cannot be read ({first_line(error)}); build the tables again."
            ) from error
        finally:
            cursor.close()
        return [dict(zip(names, map(plain, row), strict=True)) for row in rows]

    def check(self, latent: int) -> None:
        """Raise `InputError` if there is no such latent."""
        if not 0 <= latent < self.n_latents:
            raise InputError(
                f"There is no latent {latent}; these tables hold 0 to {self.n_latents - 1}."
            )

    def labels(self, latents: list[int]) -> dict[int, dict[str, Any]]:
        """Return `density`, `max`, `dead`, `label` and the most frequent `tokens` by latent."""
        rows = self.ask(
            "SELECT latent, density, max, dead, label, tokens FROM summary "
            "WHERE latent IN (SELECT unnest(?::INTEGER[]))",
            latents,
        )
        return {row["latent"]: row for row in rows}

    def _described(self) -> str:
        """Return SQL for the label of each latent that has more than a list of tokens."""
        if not (self.features / f"{LABELS}.parquet").is_file():
            return "(SELECT NULL::INTEGER AS latent, NULL::VARCHAR AS label)"
        return f"(SELECT latent, label FROM {LABELS} WHERE kind <> 'top tokens')"

    def _columns(self, name: str) -> set[str]:
        """Return the names of a table's columns."""
        return {row["column_name"] for row in self.ask(f"DESCRIBE {name}")}

    def explained(self, words: list[str], most: int) -> list[dict[str, Any]]:
        """Return latents whose explanation contains every word, in lower case, by number."""
        condition = " AND ".join("contains(lower(explanation), ?)" for _ in words)
        return self.ask(
            f"SELECT latent, explanation FROM {EXPLANATIONS} WHERE {condition} {self._chosen} "
            "ORDER BY latent LIMIT ?",
            *words,
            most,
        )

    def explanations(self, first: int, last: int) -> dict[int, str]:
        """Return the explanations of the latents `first` to `last`; several become lines."""
        if not self.has_explanations:
            return {}
        rows = self.ask(
            "SELECT latent, string_agg(explanation, chr(10) ORDER BY explanation) AS text "
            f"FROM {EXPLANATIONS} WHERE latent BETWEEN ? AND ? AND explanation IS NOT NULL "
            f"{self._chosen} GROUP BY latent",
            first,
            last,
        )
        return {row["latent"]: row["text"] for row in rows}

    def programs(self, first: int, last: int) -> dict[int, list[dict[str, Any]]]:
        """Return the programs of the latents `first` to `last`, with their scores."""
        found: dict[int, list[dict[str, Any]]] = {}
        if self.has_programs:
            for row in self.ask(
                f"SELECT latent, {PROGRAM} FROM {PROGRAMS} WHERE latent BETWEEN ? AND ? "
                "ORDER BY latent, kind",
                first,
                last,
            ):
                found.setdefault(row.pop("latent"), []).append(row)
        return found

    def titles(self, documents: list[int | None]) -> dict[int, dict[str, Any]]:
        """Return `source`, `title` and `url` by the document's number."""
        rows = self.ask(
            "SELECT document, source, title, url FROM titles "
            "WHERE document IN (SELECT unnest(?::BIGINT[]))",
            sorted({d for d in documents if d is not None and d >= 0}),
        )
        return {row.pop("document"): row for row in rows}


@contextmanager
def limited(cursor: duckdb.DuckDBPyConnection, seconds: float) -> Iterator[None]:
    """Interrupt the cursor's query after `seconds`; it raises `duckdb.InterruptException`."""
    timer = threading.Timer(seconds, cursor.interrupt)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def plain(value: Any) -> Any:
    """Convert a DuckDB value for JSON; floats are rounded to 5 digits."""
    if isinstance(value, float):
        if not value:
            return 0.0
        return float(f"{value:.5g}") if math.isfinite(value) else None
    if isinstance(value, list | tuple):
        texts = len(value) > 0 and isinstance(value[0], str)  # a DuckDB list has one type
        return list(value) if texts else [plain(v) for v in value]
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if value is None or isinstance(value, bool | int | str):
        return value
    return str(value)
