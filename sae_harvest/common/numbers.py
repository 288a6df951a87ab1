"""Numbers as people write them: 1000000, 1_000_000, 1e6 and 1M are the same count.

`Count` is the type of a field of a configuration, `CountRange` that of a command's option.
"""

from __future__ import annotations

import re
from decimal import Decimal
from typing import Annotated, Any

import click
from pydantic import BeforeValidator, Field

SUFFIXES = {"": 0, "k": 3, "m": 6, "b": 9, "g": 9, "t": 12}  # powers of ten; upper case as well
MAX_DIGITS = 25  # of the number; the limits that counts have are below 2^63
MAX_LENGTH = 28  # of what is written; Decimal computes with so many digits
_COUNT = re.compile(
    r"([-+]?(?:[0-9][0-9_]*(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][-+]?[0-9]{1,3})?)([kKmMbBgGtT]?)"
)


def parse_count(text: str) -> int:
    """The whole number that a text spells: `1_000_000`, `1e6`, `1.5M`; k, M, B or G, T multiply.

    Raises:
        ValueError: it spells none, or one of more than 25 digits.

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
    """A text that spells a count, or a float without a fraction, as int; anything else as it is."""
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
