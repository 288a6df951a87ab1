"""Numbers as people write them: 1000000, 1_000_000, 1e6 and 1M are the same count.

`Count` is a type for fields of configurations, `CountRange` a type for options of commands.
"""

from __future__ import annotations

import re
from decimal import Decimal
from typing import Annotated, Any

import click
from pydantic import BeforeValidator, Field

SUFFIXES = {"": 0, "k": 3, "m": 6, "b": 9, "g": 9, "t": 12}  # powers of ten; upper case as well
MAX_DIGITS = 25  # digits of the number; limits of counts are below 2^63
MAX_LENGTH = 28  # characters of the text; Decimal computes with this many digits
_COUNT = re.compile(
    r"([-+]?(?:[0-9][0-9_]*(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][-+]?[0-9]{1,3})?)([kKmMbBgGtT]?)"
)


def parse_count(text: str) -> int:
    """Return the whole number in a text such as `1_000_000`, `1e6` or `1.5M` (k, M, B or G, T).

    Raises:
        ValueError: the text is not a whole number, or has more than 25 digits.

    >>> parse_count("1.5M")
    1500000
    """
    match = _COUNT.fullmatch(text.strip())
    if match is None:
        raise ValueError(f"{text!r:.40} is not a whole number such as 1000000, 1_000_000, 1e6, 1M")
    digits = match[1].replace("_", "")
    if len(digits) > MAX_LENGTH:
        raise ValueError(f"{text!r:.40} has too many digits")
    number = Decimal(digits).scaleb(SUFFIXES[match[2].lower()])
    if number.adjusted() >= MAX_DIGITS:
        raise ValueError(f"{text!r:.40} has too many digits")
    if number != number.to_integral_value():
        raise ValueError(f"{text!r:.40} is not a whole number")
    return int(number)


def whole_number(value: Any) -> Any:
    """Return a count in a text, or a float without a fraction, as int; other values unchanged."""
    if isinstance(value, str):
        try:
            return parse_count(value)
        except ValueError:
            return value
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value


MAX_COUNT = 2**63 - 1
Count = Annotated[int, BeforeValidator(whole_number), Field(le=MAX_COUNT)]


class CountRange(click.IntRange):
    """`click.IntRange` that also takes 1_000_000, 1e6 and 1M."""

    name = "count"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if isinstance(value, str):
            try:
                value = parse_count(value)
            except ValueError as error:
                self.fail(f"{error}.", param, ctx)
        return super().convert(value, param, ctx)
