"""JSON records that carry their own checksum.

A record's bytes are canonical: sorted keys, no spaces, one checksum field over all the others.
Reading encodes the content again and compares, which detects a change of any single bit.
"""

from __future__ import annotations

import json
from typing import Any

import xxhash

from sae_harvest.common.errors import DamagedError

CHECKSUM = "xxh3"


def canonical(content: Any) -> bytes:
    """Return the canonical JSON of a value. Floats round-trip exactly; NaN is refused."""
    return json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def digest_of(content: Any) -> str:
    """Return the xxh3-128 of the canonical JSON of `content`, in hex."""
    return xxhash.xxh3_128_hexdigest(canonical(content))


def encode_record(content: dict[str, Any]) -> bytes:
    """Return the record's bytes, checksum included, ending in a newline."""
    return canonical(content | {CHECKSUM: digest_of(content)}) + b"\n"


def decode_record(data: bytes, name: str) -> dict[str, Any]:
    """Return the content of a record. Raise `DamagedError`, naming it, if a bit is altered."""
    return decode_with_digest(data, name)[0]


def decode_with_digest(data: bytes, name: str) -> tuple[dict[str, Any], str]:
    """Return the content of a record, and its `digest_of`, which is the record's checksum.

    Raises:
        DamagedError: a bit is altered, or the bytes are not a record.
    """
    try:
        content = json.loads(data)  # numbers that are not finite are refused below
        if b"\\ud" in data:  # perhaps a lone surrogate, which is not valid text
            json.dumps(content, ensure_ascii=False).encode()
        checksum = content.pop(CHECKSUM)
        digest = digest_of(content)
        is_whole = checksum == digest and data == canonical(content | {CHECKSUM: digest}) + b"\n"
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise DamagedError(f"{name} is damaged: it is not a record of this format.") from None
    if not is_whole:
        raise DamagedError(f"{name} is damaged: its checksum does not match its content.")
    return content, digest
