"""What comes from a file or a request ends in a value or in one sentence."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, ValidationError

from sae_harvest.common.parsing import first_line, parse_json, safe_name


@pytest.mark.parametrize(
    "text",
    [
        b"[" * 200_000,
        b'{"a":' * 200_000,
        b"1" * 5_000,
        b"NaN",
        b"[Infinity]",
        b"\xff\xfe",
        b"\x80",
        b"",
        b'"\xed\xa0\x80"',
        b"1e400",
        b"[-1e999]",
        "[1,",
    ],
)
def test_json_that_cannot_be_read_ends_in_one_sentence(text: bytes | str) -> None:
    with pytest.raises(ValueError, match=r"\A[^\n]+\Z") as refused:
        parse_json(text)
    assert type(refused.value) is ValueError


def test_json_larger_than_the_limit_is_refused_before_it_is_parsed() -> None:
    with pytest.raises(ValueError, match="more than 10"):
        parse_json(b"[" * 11, limit=10)


@given(st.binary(max_size=200) | st.text(max_size=200))
def test_any_text_is_a_value_or_a_value_error(text: bytes | str) -> None:
    try:
        value = parse_json(text)
    except ValueError:
        return
    assert parse_json(json.dumps(value)) == value


@pytest.mark.parametrize(
    "name",
    [
        "", "/", "/etc/passwd", "..", "../x", "a/../../x", "a//b", "a/", "./a", "a/.", "a\0b",
        "a\nb", "a\\b", "\ud800", "x" * 256, "é" * 128, None, 3, ["a"], b"a",
    ],
)  # fmt: skip
def test_a_name_that_leads_elsewhere_is_refused(name: object) -> None:
    with pytest.raises(ValueError, match=r"\A[^\n]+\Z"):
        safe_name(name)


@pytest.mark.parametrize(
    "name", ["a", "..a", "a..b", "activations/resid_post.12/c.0.0", "東京 [1]*"]
)
def test_a_plain_name_stays_as_it_is(name: str) -> None:
    assert safe_name(name) == name


def test_a_validation_error_becomes_a_line_with_its_place() -> None:
    class Part(BaseModel):
        k: int

    class Whole(BaseModel):
        part: Part

    with pytest.raises(ValidationError) as refused:
        Whole.model_validate({"part": {"k": "x"}})
    assert first_line(refused.value).startswith("part.k: Input should be a valid integer")
