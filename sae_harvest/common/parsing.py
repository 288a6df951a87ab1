"""Parsing of input from files and requests: a value, or one error sentence.

A file may be damaged or malicious. All JSON, and all names that become parts of paths, are checked
here. Each check returns a value or raises an error that a command prints as one sentence.
"""

from __future__ import annotations

import json
import math
from pathlib import PurePosixPath
from typing import Any

from pydantic import ValidationError

MAX_JSON_BYTES = 1 << 30  # ten times a record of the largest store
MAX_NAME_BYTES = 255  # limit of one part of a path on Linux


def parse_json(data: str | bytes | bytearray | memoryview, limit: int = MAX_JSON_BYTES) -> Any:
    """Return the value of a JSON text.

    Args:
        data: the text, or its UTF-8 bytes.
        limit: largest size in bytes (characters of a `str`).

    Raises:
        ValueError: the text is not JSON or not UTF-8, is nested too deeply, holds a number that is
            not finite or has more than 4,300 digits, or is larger than `limit`. The message has
            one line.

    >>> parse_json('{"k": 32}')
    {'k': 32}
    """
    if len(data) > limit:
        raise ValueError(f"it has {len(data):,} bytes, more than {limit:,}")
    try:
        # json.loads would accept surrogates in bytes
        text = data if isinstance(data, str) else str(data, "utf-8")
        return json.loads(text, parse_constant=_refuse, parse_float=_finite)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except UnicodeDecodeError:
        raise ValueError("it is not UTF-8") from None
    except ValueError as error:
        raise ValueError(first_line(error)) from None


def safe_name(name: object) -> str:
    """Check a name from a file before it becomes a path inside a folder, and return it.

    The name may have several parts, such as `activations/resid_post.12/c.0.0`.

    Raises:
        ValueError: the name is not a text, is empty, absolute, or leads out of its folder; or it
            has an empty part, a part of dots, a control character, a lone surrogate, a backslash,
            or a part of more than 255 bytes.

    >>> safe_name("commits/000000.json")
    'commits/000000.json'
    """
    if not isinstance(name, str) or not name:
        raise ValueError(f"{name!r:.80} is not a name")
    try:
        encoded = name.encode()
    except UnicodeEncodeError:
        raise ValueError(f"the name {name!a:.80} is not valid Unicode") from None
    if any(ord(character) < 32 or ord(character) == 127 for character in name) or "\\" in name:
        raise ValueError(f"the name {name!a:.80} has a character that names may not have")
    parts = name.split("/")
    if PurePosixPath(name).is_absolute() or any(part in ("", ".", "..") for part in parts):
        raise ValueError(f"the name {name!r:.80} points to a place outside its folder")
    if any(len(part) > MAX_NAME_BYTES for part in encoded.split(b"/")):
        raise ValueError(f"the name {name!r:.80} is too long")
    return name


def first_line(error: Exception) -> str:
    """Return the message of an error, as one line of at most 300 printable characters.

    For pydantic's `ValidationError`: the place and the message of its first error.
    """
    if isinstance(error, ValidationError):
        fault = error.errors(include_url=False, include_input=False)[0]
        # for a union, pydantic adds its own name of the tried alternative
        parts = [str(part) for part in fault["loc"] if not str(part).startswith("function-")]
        place = ".".join(parts)
        message = fault["msg"].removeprefix("Value error, ")
        line = f"{place}: {message}" if place else message
    else:
        lines = str(error).strip().splitlines()
        line = lines[0] if lines else type(error).__name__
    # a name from a file may contain line ends or lone surrogates
    return "".join(c if c.isprintable() else "?" for c in line[:300])


def _refuse(name: str) -> Any:
    raise ValueError(f"it holds {name:.80}, which is not a finite number")


def _finite(text: str) -> float:
    value = float(text)
    return value if math.isfinite(value) else _refuse(text)
