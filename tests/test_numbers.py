"""Counts as people write them."""

from __future__ import annotations

import click
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, Field, ValidationError

from sae_harvest.common.numbers import Count, CountRange, parse_count


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("1000000", 10**6), ("1_000_000", 10**6), ("1e6", 10**6), ("1E6", 10**6), ("1M", 10**6),
        ("1m", 10**6), ("1.5M", 1_500_000), (".5k", 500), ("2.5e3", 2500), ("3B", 3 * 10**9),
        ("3G", 3 * 10**9), ("1T", 10**12), ("100e-2", 1), ("-5", -5), ("0", 0), (" 12 ", 12),
    ],
)  # fmt: skip
def test_spellings_of_one_count(text: str, count: int) -> None:
    assert parse_count(text) == count


@pytest.mark.parametrize(
    "text",
    [
        "", "_", "e6", "M", "1.5", "1e-3", "1 M", "1,000", "0x10", "inf", "nan", "1e999", "1e9999",
        "9" * 5000, "٣", "1e6\0", "1MM", "\ud800",
    ],
)  # fmt: skip
def test_what_is_no_count_is_refused_in_one_line(text: str) -> None:
    with pytest.raises(ValueError, match=r"\A[^\n]{1,120}\Z"):
        parse_count(text)


@given(st.text(max_size=40) | st.from_regex(r"[-+_.0-9eEkKmM]{0,40}", fullmatch=True))
def test_any_text_is_a_count_or_a_value_error(text: str) -> None:
    try:
        found = parse_count(text)
    except ValueError:
        return
    assert isinstance(found, int)


@given(st.integers(-(10**24), 10**24))
def test_a_count_reads_back_as_it_was_written(number: int) -> None:
    assert parse_count(str(number)) == parse_count(f"{number:_}") == number


@click.command()
@click.option("--tokens", type=CountRange(1, 2**63 - 1))
def command(tokens: int) -> None:
    click.echo(repr(tokens))


def test_an_option_takes_every_spelling_and_keeps_its_bounds() -> None:
    assert CliRunner().invoke(command, ["--tokens", "2.5M"]).output == "2500000\n"
    for text in ("0", "1e20", "many", "1.5"):
        refused = CliRunner().invoke(command, ["--tokens", text])
        assert refused.exit_code == 2
        assert "Invalid value for '--tokens'" in refused.output


class Settings(BaseModel):
    tokens: Count = Field(ge=1)
    sizes: tuple[Count, ...] = ()


def test_a_field_takes_every_spelling_and_stays_strict() -> None:
    found = Settings.model_validate_json('{"tokens": "1M", "sizes": [1e3, "2k"]}', strict=True)
    assert found == Settings(tokens=10**6, sizes=(1000, 2000))
    for value in ('"x"', "1.5", "true", "0", '"1.5"', "null"):
        with pytest.raises(ValidationError):
            Settings.model_validate_json(f'{{"tokens": {value}}}', strict=True)
