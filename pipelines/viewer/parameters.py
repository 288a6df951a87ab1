"""Checks of request parameters; each returns a value or raises `InputError` with one sentence.

Query strings and bodies are untrusted. Only this module reads them.
"""

from __future__ import annotations

import math
from typing import Any

from starlette.datastructures import QueryParams

from sae_harvest.common.errors import InputError
from sae_harvest.common.parsing import parse_json
from sae_harvest.pipelines.steer import MAX_SEED, Clamp
from sae_harvest.pipelines.viewer.listing import PAGE, Listing
from sae_harvest.pipelines.viewer.notes import Notes
from sae_harvest.pipelines.viewer.tables import SUMMARY

MAX_ROWS = 500
MAX_DIGITS = 15
SHOWN = 20  # characters of a wrong value that a sentence repeats


def body_of(data: bytes) -> dict[str, Any]:
    """Return the JSON object of a request."""
    try:
        body = parse_json(data)
    except ValueError as error:
        raise InputError(f"The request is not JSON ({error}).") from None
    if not isinstance(body, dict):
        raise InputError("The request is not a JSON object.")
    return body


def typed(body: dict[str, Any], name: str, kind: type) -> Any:
    """Return a member of the object that must have this type."""
    value = body.get(name)
    if not isinstance(value, kind) or isinstance(value, bool):
        raise InputError(f"The request lacks {name}, or it is not of the right type.")
    return value


def text_of(body: dict[str, Any], name: str) -> str:
    """Return a member that must be text."""
    return checked_text(typed(body, name, str), name)


def checked_text(text: object, name: str) -> str:
    """Return the text if UTF-8 can encode it."""
    if not isinstance(text, str):
        raise InputError(f"The {name} is not text.")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise InputError(
            f"The {name} holds half a character (a lone surrogate); give whole characters."
        ) from None
    return text


def number_of(body: dict[str, Any], name: str) -> float:
    """Return a member that must be a number."""
    value = body.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise InputError(f"The request lacks {name}, or it is not a number.")
    try:
        return float(value)
    except OverflowError:
        raise InputError(f"The {name} is too large a number.") from None


def whole_of(body: dict[str, Any], name: str, high: int = 10**MAX_DIGITS) -> int:
    """Return a member that must be a whole number, below `high` in absolute value."""
    value: int = typed(body, name, int)
    if not -high < value < high:
        raise InputError(f"The {name} is too large a number.")
    return value


def tags_of(body: dict[str, Any]) -> list[str]:
    """Return the tags of a note."""
    tags = typed(body, "tags", list)
    if not all(isinstance(tag, str) for tag in tags):
        raise InputError("Tags are text.")
    return [checked_text(tag, "tag") for tag in tags]


def clamps_of(body: dict[str, Any]) -> list[Clamp]:
    """Return the clamps of a request."""
    clamps = []
    for clamp in typed(body, "clamps", list):
        if not isinstance(clamp, dict):
            raise InputError("A clamp is an object with latent and value.")
        clamps.append(Clamp(whole_of(clamp, "latent"), number_of(clamp, "value")))
    return clamps


def seed_of(body: dict[str, Any]) -> int:
    """Return the seed of the draws."""
    return whole_of(body, "seed", MAX_SEED)


def latent_of(text: str, n_latents: int) -> int:
    """Return the number of a latent in an address."""
    if not (text.isascii() and text.isdecimal() and len(text) <= MAX_DIGITS):
        raise InputError(
            f"There is no latent {_short(text)}; these tables hold 0 to {n_latents - 1}."
        )
    return int(text)


def listing_of(query: QueryParams, notes: Notes) -> Listing:
    """Return the list that a query asks for: `density=0.001..` is a range, `tag=` a tag."""
    between = {}
    for name in SUMMARY:
        if name in query:
            low, _, high = query[name].partition("..")
            between[name] = (real(low), real(high))
    latents = None
    if tag := query.get("tag"):
        latents = [n for n, entry in notes.noted().items() if tag in entry["tags"]]
    return Listing(
        sort=query.get("sort", "latent"),
        descending=query.get("desc") == "1",
        between=between,
        fires_on=query.get("fires_on", "")[:200],
        dead=query.get("dead") == "1",
        latents=latents,
        offset=whole(query.get("offset"), 0, 0),
        limit=whole(query.get("limit"), PAGE, 1, MAX_ROWS),
    )


def whole(text: str | None, default: int, low: int, high: int = 2**31 - 1) -> int:
    """Return a whole number of a query, or `default` if it is left out."""
    if text is None:
        return default
    if not (text.isascii() and text.isdecimal() and len(text) <= MAX_DIGITS) or not (
        low <= int(text) <= high
    ):
        raise InputError(f"{_short(text)!r} is not a whole number from {low} to {high}.")
    return int(text)


def real(text: str | None) -> float | None:
    """Return a finite number of a query, or None if it is left out."""
    if not text:
        return None
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise InputError(f"{_short(text)!r} is not a number.")
    return value


def _short(text: str) -> str:
    return text if len(text) <= SHOWN else text[:SHOWN] + "…"
