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
    """The part of the list that is asked for.

    Args:
        between: smallest and largest value of a column of `SUMMARY`, either may be None.
        fires_on: a latent is listed if one of its most frequent tokens contains this.
        latents: only these.
    """

    sort: str = "latent"
    descending: bool = False
    between: dict[str, tuple[float | None, float | None]] = field(default_factory=dict)
    fires_on: str = ""
    dead: bool = False
    latents: Sequence[int] | None = None
    offset: int = 0
    limit: int = PAGE


def list_latents(tables: Tables, listing: Listing) -> dict[str, Any]:
    """total: how many there are; rows: those of this page.

    Raises:
        InputError: no such column.
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
    # names of columns are those of SUMMARY, checked above
    order = f"isnan({listing.sort}::DOUBLE), {listing.sort} {'DESC' if listing.descending else ''}"
    rows = tables.ask(
        f"SELECT {', '.join(SUMMARY)}, dead, tokens FROM summary {where} "
        f"ORDER BY {listing.sort} IS NULL, {order}, latent LIMIT ? OFFSET ?",
        *values,
        listing.limit,
        listing.offset,
    )
    return {"total": total["n"], "offset": listing.offset, "rows": rows}
