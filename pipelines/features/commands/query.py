"""`sae-features query`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click
from rich.table import Table
from rich.text import Text

from sae_harvest.common.console import output
from sae_harvest.common.errors import InputError
from sae_harvest.common.numbers import CountRange
from sae_harvest.common.options import PathOption
from sae_harvest.pipelines.options import features_option

if TYPE_CHECKING:
    from sae_harvest.pipelines.features.reading.query import Question

TABLE_ROWS = 50
MAX_SQL_BYTES = 1 << 20


@click.command()
@click.argument("sql", required=False)
@features_option
@click.option(
    "--format",
    "format_name",
    type=click.Choice(["table", "csv", "json", "parquet"]),
    help="Format of the result. Default: the ending of --output; a table in a terminal; else csv.",
)
@click.option(
    "--output",
    "target",
    type=PathOption(),
    metavar="FILE",
    help="New file for the result: .csv, .json or .parquet.",
)
@click.option(
    "--limit",
    type=CountRange(min=1),
    help=f"Most rows to return. Default: {TABLE_ROWS} for a table, all for other formats.",
)
def query(
    sql: str | None,
    features: Path,
    format_name: str | None,
    target: Path | None,
    limit: int | None,
) -> None:
    """Run a SELECT over latents, contexts, histograms, neighbours, tokens, documents and firings.

    Added tables are read as well: explanations, programs.
    It reads these tables and no other file, and writes nothing but --output. Without SQL, or with
    -, the query is read from standard input. A terminal gets a table of 50 rows; a pipe gets all
    rows as CSV, in which lists are JSON.

    \b
    sae-features query "SELECT latent, density FROM latents ORDER BY density DESC LIMIT 5"
    sae-features query --output dense.parquet "SELECT * FROM latents WHERE density > 0.1"
    echo "SELECT count(*) FROM latents" | sae-features query --format json
    """
    from sae_harvest.pipelines.features.reading.query import asked
    from sae_harvest.pipelines.features.reading.results import WRITERS, new_file

    format_name = _format(format_name, target)
    with asked(features, _question(sql)) as question:
        if format_name == "table":
            _print_table(question, limit or TABLE_ROWS)
        elif target is None:
            WRITERS[format_name](question, limit, sys.stdout.buffer)
        else:
            with new_file(target) as sink:
                WRITERS[format_name](question, limit, sink)


def _question(sql: str | None) -> str:
    """Return the query, from standard input if it is not among the arguments."""
    if sql is None and (sys.stdin is None or sys.stdin.isatty()):
        raise click.UsageError("Give a query, or - to type one here.")
    if sql not in (None, "-"):
        return sql
    text = sys.stdin.buffer.read(MAX_SQL_BYTES + 1)
    if len(text) > MAX_SQL_BYTES:
        raise InputError(f"The query on standard input has more than {MAX_SQL_BYTES:,} bytes.")
    try:
        return text.decode()
    except UnicodeDecodeError:
        raise InputError("The query on standard input is not UTF-8.") from None


def _format(name: str | None, target: Path | None) -> str:
    """Choose the format of the result; a usage error if it cannot be written in it."""
    on_terminal = target is None and sys.stdout.buffer.isatty()
    if name is None and target is None:
        return "table" if on_terminal else "csv"
    if name is None and target is not None:
        name = target.suffix.removeprefix(".").lower()
        if name not in ("csv", "json", "parquet"):
            raise click.UsageError(
                f"--output {target}: end it in .csv, .json or .parquet, or give --format."
            )
    if name == "table" and target is not None:
        raise click.UsageError("A file gets csv, json or parquet; leave out --format table.")
    if name == "parquet" and on_terminal:
        raise click.UsageError("A terminal cannot show Parquet; give --output FILE.")
    return str(name)


def _print_table(question: Question, limit: int) -> None:
    """Print rows as a table for people."""
    from sae_harvest.pipelines.features.reading.show import visible

    columns, found = question.rows(limit + 1)
    rows = list(found)
    table = Table(box=None)
    for column in columns:
        table.add_column(Text(visible(column)), overflow="fold")
    for row in rows[:limit]:
        table.add_row(*(Text(visible(_cell(value))) for value in row))
    output().print(table)
    if len(rows) > limit:
        click.echo(f"… more rows; --limit {limit} were printed.", err=True)


def _cell(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, list):
        return ", ".join(_cell(v) for v in value)
    return "" if value is None else str(value)
