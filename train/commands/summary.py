"""Evaluations of reconstruction as a table for the terminal."""

from __future__ import annotations

from typing import Any

from rich.table import Column, Table


def number(value: Any, form: str) -> str:
    """Format a value; a dash for None."""
    return "-" if value is None else format(value, form)


ROWS = {
    "without_outliers": "without outliers",
    "with_outliers": "with outliers",
    "without_outliers_without_bos": "without outliers, without BOS",
    "with_outliers_without_bos": "with outliers, without BOS",
}


def summary(evaluations: dict[str, Any]) -> Table:
    """Return the evaluations as a table. A single one has its name as the title."""
    single = len(evaluations) == 1
    title = next(iter(evaluations)) if single else None
    columns: list[Any] = ["held-out rows", "rows", "FVU", "L0", "never fired"]
    if not single:
        columns.insert(0, Column("SAE", overflow="fold"))
    table = Table(*columns, title=title, box=None)
    for name, evaluation in evaluations.items():
        for group in (group for group in ROWS if group in evaluation):
            values = evaluation[group]
            cells = [ROWS[group], f"{values['rows']:,}"]
            cells += [
                number(values[key], form)
                for key, form in (("fvu", ".4f"), ("l0", ".1f"), ("dead_share", ".1%"))
            ]
            table.add_row(*(cells if single else (name, *cells)))
    return table
