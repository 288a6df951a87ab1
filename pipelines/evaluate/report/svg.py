"""Plots as SVG text, for a page that needs no other file: lines and points with two axes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 460, 270
LEFT, RIGHT, TOP, BOTTOM = 62, 14, 14, 42
TICKS = 5
# Colours that are apart for every kind of colour vision (Okabe and Ito 2008); black follows the
# page's ink.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7f7f7f", "#8c6d31")


@dataclass(frozen=True, slots=True)
class Series:
    """A line or a set of points."""

    name: str
    """Name in the legend."""

    x: Sequence[float]
    """Horizontal places."""

    y: Sequence[float | None]
    """Vertical places; None leaves a gap."""

    points: bool = False
    """True to draw points instead of a line."""


@dataclass(frozen=True, slots=True)
class Axis:
    """One axis of a plot."""

    label: str
    """Text beside the axis."""

    low: float
    """First value."""

    high: float
    """Last value."""

    log: bool = False
    """True if the scale is logarithmic."""

    @classmethod
    def over(cls, label: str, values: Sequence[float], log: bool = False) -> Axis:
        """Make an axis that shows all values; those of 0 and below are left out of a log scale."""
        shown = [value for value in values if math.isfinite(value) and (value > 0 or not log)]
        low, high = (min(shown), max(shown)) if shown else (0.0, 1.0)
        if log:
            return cls(label, low / 1.1, high * 1.1, True)
        room = 0.05 * (high - low) or 0.5
        return cls(label, 0.0 if 0 <= low < 0.5 * high else low - room, high + room)

    def share(self, value: float) -> float:
        """Return where a value lies, 0 at the low end and 1 at the high end."""
        if self.log:
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)

    def ticks(self) -> list[float]:
        """Return round values along the axis."""
        if self.log:
            first = math.floor(math.log10(self.low))
            last = math.ceil(math.log10(self.high))
            steps = (1,) if last - first > 4 else (1, 2, 5)
            found = [step * 10.0**power for power in range(first, last + 1) for step in steps]
        else:
            raw = (self.high - self.low) / TICKS
            size = 10.0 ** math.floor(math.log10(raw))
            step = next(size * n for n in (1, 2, 2.5, 5, 10) if size * n >= raw)
            first = math.ceil(self.low / step)
            found = [n * step for n in range(first, first + 2 * TICKS + 2)]
        return [tick for tick in found if self.low <= tick <= self.high]


def plot(
    series: Sequence[Series],
    x_label: str,
    y_label: str,
    colours: dict[str, str],
    log_x: bool = False,
    log_y: bool = False,
) -> str:
    """Return a plot as an SVG element.

    Args:
        series: lines and points; a name keeps its colour.
        x_label, y_label: texts beside the axes.
        colours: colour of each series by name.
        log_x, log_y: whether an axis is logarithmic.
    """
    pairs = [
        (x, y)
        for one in series
        for x, y in zip(one.x, one.y, strict=True)
        if y is not None and (x > 0 or not log_x)
    ]
    x_axis = Axis.over(x_label, [x for x, _ in pairs], log_x)
    y_axis = Axis.over(y_label, [y for _, y in pairs], log_y)
    body = [*_frame(x_axis, y_axis)]
    for one in series:
        colour = colours[one.name]
        segments = _segments(one, x_axis, y_axis)
        title = f"<title>{escape(one.name)}</title>"
        for segment in segments:
            if one.points:
                body += [
                    f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4.5" fill="{colour}">{title}</circle>'
                    for x, y in segment
                ]
            else:
                path = " ".join(f"{x:.1f},{y:.1f}" for x, y in segment)
                body.append(
                    f'<polyline points="{path}" fill="none" stroke="{colour}" '
                    f'stroke-width="1.8">{title}</polyline>'
                )
    label = escape(f"{y_label} against {x_label}")
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}">'
        + "".join(body)
        + "</svg>"
    )


def _segments(series: Series, x_axis: Axis, y_axis: Axis) -> list[list[tuple[float, float]]]:
    """Return the places of a series on the plot, in parts without a gap."""
    found: list[list[tuple[float, float]]] = [[]]
    for x, y in zip(series.x, series.y, strict=True):
        hidden = y is None or (y_axis.log and y <= 0) or (x_axis.log and x <= 0)
        if hidden or y is None:
            found.append([])
        else:
            found[-1].append(
                (
                    LEFT + x_axis.share(x) * (WIDTH - LEFT - RIGHT),
                    HEIGHT - BOTTOM - y_axis.share(y) * (HEIGHT - TOP - BOTTOM),
                )
            )
    return [segment for segment in found if segment]


def _frame(x_axis: Axis, y_axis: Axis) -> list[str]:
    """Return the grid, the ticks and the labels."""
    right, bottom = WIDTH - RIGHT, HEIGHT - BOTTOM
    found = []
    for tick in x_axis.ticks():
        x = LEFT + x_axis.share(tick) * (right - LEFT)
        found.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{bottom}"/>')
        found.append(
            f'<text x="{x:.1f}" y="{bottom + 16}" text-anchor="middle">{number(tick)}</text>'
        )
    for tick in y_axis.ticks():
        y = bottom - y_axis.share(tick) * (bottom - TOP)
        found.append(f'<line class="grid" x1="{LEFT}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>')
        found.append(
            f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{number(tick)}</text>'
        )
    middle, centre = (LEFT + right) / 2, (TOP + bottom) / 2
    found.append(
        f'<text class="label" x="{middle}" y="{HEIGHT - 6}" text-anchor="middle">'
        f"{escape(x_axis.label)}</text>"
    )
    found.append(
        f'<text class="label" transform="translate(13 {centre}) rotate(-90)" '
        f'text-anchor="middle">{escape(y_axis.label)}</text>'
    )
    return found


def number(value: float) -> str:
    """Format a tick: short, without an exponent where that is readable."""
    if value == 0:
        return "0"
    if 1e-3 <= abs(value) < 1e5:
        return f"{value:.6f}".rstrip("0").rstrip(".")[:7]
    return f"{value:.0e}".replace("e-0", "e-").replace("e+0", "e")
