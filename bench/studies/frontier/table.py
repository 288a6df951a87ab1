"""The figures of the study as a table and as plots."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean

import pyarrow as pa

from bench.studies.frontier.members import Point
from sae_harvest.pipelines.evaluate.probing.summary import EVERY_TASK
from sae_harvest.pipelines.evaluate.programs.sampled import N2G
from sae_harvest.pipelines.evaluate.programs.scoring import NGRAMS
from sae_harvest.pipelines.evaluate.report.svg import COLOURS, HEIGHT, WIDTH, Series, plot

ROWS, TOKENS = "without outliers", "predicted tokens"


@dataclass(frozen=True)
class Column:
    """A column of the table."""

    heading: str
    metric: str
    part: str
    digits: int
    """Digits behind the point."""


L0 = Column("L0", "l0", ROWS, 1)
PLOTTED = (
    Column("FVU", "fvu", ROWS, 3),
    Column("ΔCE, nats", "delta_ce", TOKENS, 3),
    Column("probe loss", "probe_loss_relative", EVERY_TASK, 3),
    Column("probe loss, other documents", "probe_loss_test_relative", EVERY_TASK, 3),
    Column("F1, N2G", "program_f1", N2G, 2),
    Column("F1, n-grams", "program_f1", NGRAMS, 3),
)
LOGARITHMIC = ("fvu", "delta_ce")
DEAD = Column("dead", "dead_share", "all rows", 3)
COLUMNS = (L0, *PLOTTED, DEAD)


@dataclass(frozen=True)
class Cell:
    """A figure of a point: mean over its dictionaries."""

    value: float | None
    """The mean."""
    half_width: float | None
    """Half of the mean width of the 95 % intervals, which are over documents."""
    half_range: float | None
    """Half of the range of the values of the seeds."""

    def text(self, digits: int) -> str:
        """Write value, half of the interval, and in parentheses half of the seeds' range."""
        if self.value is None:
            return "-"
        written = f"{self.value:.{digits}f}"
        if self.half_width is not None:
            written += f" ±{self.half_width:.{digits}f}"
        if self.half_range is not None:
            written += f" ({self.half_range:.{digits}f})"
        return written


def cells(table: pa.Table, points: Sequence[Point]) -> dict[tuple[Point, Column], Cell]:
    """Return the cell of each point and column."""
    known = {(row["subject"], row["metric"], row["part"]): row for row in table.to_pylist()}
    found = {}
    for point in points:
        for column in COLUMNS:
            rows = [known[name, column.metric, column.part] for name in point.names]
            found[point, column] = _cell(rows)
    return found


def _cell(rows: Sequence[dict[str, float | None]]) -> Cell:
    values = [value for row in rows if (value := row["value"]) is not None]
    if len(values) < len(rows):
        return Cell(None, None, None)
    widths = [
        high - low
        for row in rows
        if (low := row["low"]) is not None and (high := row["high"]) is not None
    ]
    return Cell(
        mean(values),
        mean(widths) / 2 if widths else None,
        (max(values) - min(values)) / 2 if len(values) > 1 else None,
    )


def markdown(table: pa.Table, points: Sequence[Point]) -> str:
    """Return the table as Markdown."""
    found = cells(table, points)
    lines = [["", *(column.heading for column in COLUMNS)], ["---"] * (1 + len(COLUMNS))]
    for point in points:
        texts = [found[point, column].text(column.digits) for column in COLUMNS]
        lines.append([point.title, *texts])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def drawing(table: pa.Table, points: Sequence[Point]) -> str:
    """Return all plots against L0 as one SVG file."""
    found = cells(table, points)
    families = list(dict.fromkeys(point.family for point in points))
    colours = dict(zip(families, (*COLOURS, "black"), strict=False))
    body = []
    for number, column in enumerate(PLOTTED):
        series = [_series(family, column, points, found) for family in families]
        log = column.metric in LOGARITHMIC
        picture = plot(series, L0.heading, column.heading, colours, log_x=True, log_y=log)
        x, y = number % 2 * WIDTH, number // 2 * HEIGHT
        size = f'x="{x}" y="{y}" width="{WIDTH}" height="{HEIGHT}"'
        body.append(picture.replace("<svg ", f"<svg {size} ", 1))
    height = (len(PLOTTED) + 1) // 2 * HEIGHT
    for number, family in enumerate(families):
        x, y = 20 + number % 5 * 180, height + 20 + number // 5 * 22
        body.append(
            f'<rect x="{x}" y="{y - 9}" width="18" height="4" fill="{colours[family]}"/>'
            f'<text x="{x + 24}" y="{y}">{family}</text>'
        )
    whole = f"0 0 {2 * WIDTH} {height + 50}"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="{whole}" font-family="sans-serif" '
        'font-size="12"><style>.grid{stroke:#ddd}</style><rect width="100%" height="100%" '
        f'fill="white"/>{"".join(body)}</svg>\n'
    )


def _series(
    family: str,
    column: Column,
    points: Sequence[Point],
    found: dict[tuple[Point, Column], Cell],
) -> Series:
    """Return the line of one family."""
    shown = [
        (l0, found[point, column].value)
        for point in points
        if point.family == family and (l0 := found[point, L0].value) is not None
    ]
    shown.sort(key=lambda pair: pair[0])
    return Series(family, [x for x, _ in shown], [y for _, y in shown])
