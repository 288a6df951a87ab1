"""The list of latents: sorted and filtered by DuckDB, a page at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from sae_harvest.common.errors import InputError
from sae_harvest.pipelines.viewer.tables import SUMMARY, Tables

PAGE = 50


@dataclass(frozen=True)
class Listing:
    """The part of the list that a request asks for."""

    sort: str = "latent"
    """Column of `SUMMARY` to sort by."""

    descending: bool = False
    """Whether the largest value comes first."""

    between: dict[str, tuple[float | None, float | None]] = field(default_factory=dict)
    """Smallest and largest value, both included, by column of `SUMMARY`; None is no limit."""

    fires_on: str = ""
    """Text that one of a latent's most frequent tokens must contain, in any case."""

    dead: bool = False
    """Whether dead latents are listed too."""

    latents: Sequence[int] | None = None
    """The latents to choose from; None chooses from all."""

    offset: int = 0
    """Number of latents before the page."""

    limit: int = PAGE
    """Largest number of latents on the page."""


def list_latents(tables: Tables, listing: Listing) -> dict[str, Any]:
    """Return `rows`, the latents of one page, and `total`, the number of latents that match.

    Raises:
        InputError: a column does not exist.
    """
    for name in [listing.sort, *listing.between]:
        if name not in SUMMARY:
            raise InputError(f"There is no column {name[:20]!r}; use one of {', '.join(SUMMARY)}.")
    conditions: list[str] = []
    values: list[object] = []
    for name, (low, high) in listing.between.items():
        if low is not None:
            conditions.append(f"{name} >= ?")
            values.append(low)
        if high is not None:
            conditions.append(f"{name} <= ?")
            values.append(high)
    if listing.fires_on:
        conditions.append("len(list_filter(tokens, lambda t: contains(lower(t), lower(?)))) > 0")
        values.append(listing.fires_on)
    if not listing.dead:
        conditions.append("NOT dead")
    if listing.latents is not None:
        conditions.append("latent IN (SELECT unnest(?::INTEGER[]))")
        values.append(list(listing.latents))
    where = f"WHERE {' AND '.join(conditions)}" if conditions else ""
    (total,) = tables.ask(f"SELECT count(*) AS n FROM summary {where}", *values)
    # column names are safe in SQL: the loop above checked them against SUMMARY
    order = f"isnan({listing.sort}::DOUBLE), {listing.sort} {'DESC' if listing.descending else ''}"
    rows = tables.ask(
        f"SELECT {', '.join(SUMMARY)}, dead, label, tokens FROM summary {where} "
        f"ORDER BY {listing.sort} IS NULL, {order}, latent LIMIT ? OFFSET ?",
        *values,
        listing.limit,
        listing.offset,
    )
    return {"total": total["n"], "offset": listing.offset, "rows": rows}
