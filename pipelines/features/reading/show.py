"""One latent in the terminal: statistics, logit lens, contexts coloured by activation."""

from __future__ import annotations

from itertools import starmap
from pathlib import Path
from typing import Any

import duckdb
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from sae_harvest.common.errors import InputError
from sae_harvest.pipelines.features.reading.query import connect, reading
from sae_harvest.pipelines.features.tables.checks import (
    check_context,
    check_histogram,
    check_latent,
    require_tables,
)
from sae_harvest.pipelines.features.tables.folder import PROGRAMS
from sae_harvest.pipelines.features.tables.texts import pieces

BARS = "▁▂▃▄▅▆▇█"
COARSE = 4  # bins of the table per bar
HEAT = ("#fff3d6", "#ffe0a3", "#ffc766", "#ffa633", "#f57c00")  # light to strong
SHOWN_TOKENS = 8
SHOWN_NEIGHBOURS = 4
CONTROLS = (*range(32), *range(127, 160))
VISIBLE = dict.fromkeys(CONTROLS, "·") | {ord("\n"): "↵"}


def render_latent(features: Path, latent: int, n_contexts: int) -> RenderableType:
    """Render the output of `sae-features show`.

    Raises:
        InputError: there is no such latent.
        RunError: there are no tables.
    """
    highest = require_tables(features)["n_latents"] - 1
    if not 0 <= latent <= highest:
        raise InputError(f"There is no latent {latent}; these tables hold 0 to {highest}.")
    with reading(features):
        return _rendered(features, latent, n_contexts)


def _rendered(features: Path, latent: int, n_contexts: int) -> RenderableType:
    connection = connect(features)
    facts = _one(connection, "SELECT * FROM latents WHERE latent = ?", latent)
    check_latent(features, facts)
    parts: list[RenderableType] = [_headline(facts)]
    if facts["dead"]:
        parts.append(Text("It never fired on these rows.", style="bold"))
        return Group(*parts)
    parts.append(_statistics(features, connection, facts))
    parts += _programs(features, connection, latent)
    for stratum in ("top", "random"):
        found = connection.execute(
            "SELECT c.activation, c.position, c.window_start, c.text, c.token_ends, c.activations, "
            "d.source, d.title FROM contexts c LEFT JOIN documents d USING (document) "
            "WHERE c.latent = ? AND c.stratum = ? ORDER BY c.rank LIMIT ?",
            [latent, stratum, n_contexts if stratum == "top" else max(1, n_contexts // 3)],
        ).fetchall()
        for activation, position, start, text, ends, activations, *_ in found:
            place = None if None in (activation, position, start) else position - start
            check_context(features, latent, stratum, place, text, ends, activations)
        if found:
            parts.append(Text(f"\n{stratum} contexts", style="bold"))
        parts.extend(_context(*row, maximum=facts["max"]) for row in found)
    return Group(*parts)


def highlight(texts: list[str], activations: list[float], maximum: float, peak: int | None) -> Text:
    """Colour the background of tokens by activation; the peak is bold."""
    line = Text()
    for at, (text, a) in enumerate(zip(texts, activations, strict=True)):
        style = ""
        if a > 0:
            level = min(int(a / max(maximum, 1e-9) * len(HEAT)), len(HEAT) - 1)
            style = f"{'bold ' if at == peak else ''}black on {HEAT[level]}"
        line.append(visible(text), style)
    return line


def visible(text: str) -> str:
    """Put text of a corpus on one line, without control characters that affect the terminal."""
    return text.translate(VISIBLE)


def _headline(facts: dict[str, Any]) -> Text:
    return Text(f"latent {facts['latent']}", style="bold underline")


def _statistics(
    features: Path, connection: duckdb.DuckDBPyConnection, facts: dict[str, Any]
) -> Table:
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="dim")
    table.add_column()
    table.add_row(
        "fires on",
        f"{facts['n_fire']:,} tokens ({facts['density']:.3%}), "
        f"{facts['n_contexts']:,} contexts ({facts['context_density']:.2%})",
    )
    table.add_row(
        "activation",
        f"max {facts['max']:.2f}, mean {facts['mean']:.2f}, "
        f"median {facts['q50']:.2f}, 99 % {facts['q99']:.2f}",
    )
    bins = connection.execute(
        "SELECT bin, low, high, count FROM histograms WHERE latent = ? ORDER BY bin",
        [facts["latent"]],
    ).fetchall()
    check_histogram(features, facts["latent"], bins)
    counts = {b: n for b, _, _, n in bins}
    first, last = bins[0][0] // COARSE, bins[-1][0] // COARSE
    filled = [
        sum(counts.get(b, 0) for b in range(COARSE * bar, COARSE * (bar + 1)))
        for bar in range(first, last + 1)
    ]
    peak = max(filled)
    drawn = "".join(" " if n == 0 else BARS[(len(BARS) - 1) * n // peak] for n in filled)
    table.add_row("histogram", f"{bins[0][1]:.2g} {drawn} {bins[-1][2]:.2g} (log scale)")
    tokens = zip(facts["top_tokens"], facts["top_token_counts"], strict=True)
    table.add_row(
        "on tokens",
        ", ".join(
            f"{_quoted(t)} {n / facts['n_fire']:.0%}" for t, n in list(tokens)[:SHOWN_TOKENS]
        ),
    )
    if facts["top_logit_tokens"] is not None:
        for end, name in (("top", "speaks for"), ("bottom", "against")):
            shown = facts[f"{end}_logit_tokens"][:SHOWN_TOKENS]
            table.add_row(name, ", ".join(_quoted(t) for t in shown))
    for rank, name in (("cosine_rank", "alike"), ("cofire_rank", "fires with")):
        near = connection.execute(
            f"SELECT other, decoder_cosine, jaccard FROM neighbours WHERE latent = ? "
            f"AND {rank} < {SHOWN_NEIGHBOURS} ORDER BY {rank}",
            [facts["latent"]],
        ).fetchall()
        table.add_row(name, ", ".join(starmap(_neighbour, near)))
    return table


def _programs(
    features: Path, connection: duckdb.DuckDBPyConnection, latent: int
) -> list[RenderableType]:
    """Show the programs that predict the latent from tokens, if there are any."""
    if not (features / f"{PROGRAMS}.parquet").is_file():
        return []
    found = connection.execute(
        "SELECT kind, program, f1, f1_low, f1_high, other_f1, rows, positives FROM programs "
        "WHERE latent = ? ORDER BY kind",
        [latent],
    ).fetchall()
    if not found:
        return []
    table = Table(box=None, pad_edge=False)
    for column in ("kind", "F1", "95 %", "another's"):
        table.add_column(column, style="dim")
    table.add_column("program", overflow="fold")
    for kind, program, *scores, _, _ in found:
        f1, low, high, other = ("–" if x is None else f"{x:.2f}" for x in scores)
        limits = f"{low} to {high}"
        table.add_row(visible(kind or ""), f1, limits, other, visible(program or ""))
    rows, positives = found[0][-2:]
    title = f"\nprograms, scored on {rows or 0:,} held-out rows, {positives or 0:,} with a firing"
    return [Text(title, style="bold"), table]


def _neighbour(other: int | None, cosine: float | None, jaccard: float | None) -> str:
    """Format a neighbour; the cosine is None for latents without a decoder."""
    known = [
        f"{name} {value:.2f}"
        for name, value in (("cosine", cosine), ("Jaccard", jaccard))
        if value is not None
    ]
    return f"{other} ({', '.join(known)})"


def _context(
    activation: float,
    position: int,
    window_start: int,
    text: str,
    ends: list[int],
    activations: list[float],
    source: str | None,
    title: str | None,
    *,
    maximum: float,
) -> Text:
    line = Text.assemble((f"{activation:7.2f}  ", "bold"))
    line.append_text(highlight(pieces(text, ends), activations, maximum, position - window_start))
    where = visible(" · ".join(part for part in (source, title) if part))
    return line.append(f"  {where}", style="dim italic") if where else line


def _quoted(text: str) -> str:
    return f"‘{visible(text)}’"


def _one(connection: duckdb.DuckDBPyConnection, sql: str, *values: object) -> dict[str, Any]:
    result = connection.execute(sql, list(values))
    names = [column[0] for column in result.description or []]
    (row,) = result.fetchall()
    return dict(zip(names, row, strict=True))
