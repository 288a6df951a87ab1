"""JSON records that carry their own checksum.

A record's bytes are canonical: sorted keys, no spaces, one checksum field over all the others.
Reading re-encodes and compares, so that a change of any single bit is noticed.
"""

from __future__ import annotations

import json
from typing import Any

import xxhash

from store.errors import DamagedError

CHECKSUM = "xxh3"


def canonical(content: Any) -> bytes:
    """The one way a value is written as JSON here; floats round-trip exactly, NaN is refused."""
    return json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def digest_of(content: Any) -> str:
    """xxh3-128 of the canonical JSON of `content`, in hex."""
    return xxhash.xxh3_128_hexdigest(canonical(content))


def encode_record(content: dict[str, Any]) -> bytes:
    """The record's bytes, checksum included, ending in a newline."""
    return canonical(content | {CHECKSUM: digest_of(content)}) + b"\n"


def decode_record(data: bytes, name: str) -> dict[str, Any]:
    """The content of a record; `DamagedError` with `name` if a bit of it is not as written."""
    try:
        content = json.loads(data)
        checksum = content.pop(CHECKSUM)
        digest = digest_of(content)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise DamagedError(f"{name} is damaged: it is not a record of this format.") from None
    if checksum != digest or data != encode_record(content):
        raise DamagedError(f"{name} is damaged: its checksum does not match its content.")
    return content
