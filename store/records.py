"""JSON records that carry their own checksum.

A record's bytes are canonical: sorted keys, no spaces, one checksum field over all the others.
Reading re-encodes and compares, so that a change of any single bit is noticed.
"""

from __future__ import annotations

import json
from typing import Any

import xxhash

from sae_harvest.common.errors import DamagedError

CHECKSUM = "xxh3"


def canonical(content: Any) -> bytes:
    """The one way a value is written as JSON here; floats round-trip exactly, NaN is refused."""
    return json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def digest_of(content: Any) -> str:
    """xxh3-128 of the canonical JSON of `content`, in hex."""
    return xxhash.xxh3_128_hexdigest(canonical(content))


def encode_record(content: dict[str, Any]) -> bytes:
    """Return the record's bytes, checksum included, ending in a newline."""
    return canonical(content | {CHECKSUM: digest_of(content)}) + b"\n"


def decode_record(data: bytes, name: str) -> dict[str, Any]:
    """The content of a record; `DamagedError` with `name` if a bit of it is not as written."""
    return decode_with_digest(data, name)[0]


def decode_with_digest(data: bytes, name: str) -> tuple[dict[str, Any], str]:
    """Return the content of a record, and the `digest_of` it, which is the record's checksum.

    Raises:
        DamagedError: a bit of it is not as written, or it is no record.
    """
    try:
        content = json.loads(data)  # what is not finite is refused below, as it is never written
        if b"\\ud" in data:  # perhaps half of a pair, which no text has
            json.dumps(content, ensure_ascii=False).encode()
        checksum = content.pop(CHECKSUM)
        digest = digest_of(content)
        is_whole = checksum == digest and data == canonical(content | {CHECKSUM: digest}) + b"\n"
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise DamagedError(f"{name} is damaged: it is not a record of this format.") from None
    if not is_whole:
        raise DamagedError(f"{name} is damaged: its checksum does not match its content.")
    return content, digest
