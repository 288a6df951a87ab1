"""The header of a safetensors file whose data is written piece by piece.

The format's own library needs all tensors at once and copies them. A file consists of the length of
the header (8 bytes, little-endian), the header in JSON, and the tensors one after the other.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np

LENGTH_BYTES = 8  # of the number before the header
ALIGNMENT = 8  # of the first tensor


@dataclass(frozen=True)
class Header:
    """The beginning of a file, and the offsets of its tensors."""

    data: bytes
    """The first bytes of the file: length and header."""
    offsets: dict[str, int]
    """Tensor → offset of its first byte in the file."""
    size: int
    """Bytes of the whole file."""


def dtype_name(dtype: np.dtype[Any]) -> str:
    """Return the format's name of a dtype of integers or floats: U16, I64, F32."""
    return f"{dtype.kind.upper()}{8 * dtype.itemsize}"


def make_header(
    tensors: Mapping[str, tuple[str, Sequence[int]]],
    metadata: Mapping[str, str] | None = None,
    *,
    compact: bool = False,
    json_bytes: int = 0,
) -> Header:
    """Return the header of tensors that are stored in the given order.

    Args:
        tensors: dtype and shape by name.
        compact: no spaces after commas and colons, as the format's own library writes it.
        json_bytes: length to which the JSON is padded with spaces; 0 pads it to a multiple of
            `ALIGNMENT`.
    """
    entries: dict[str, Any] = {} if metadata is None else {"__metadata__": dict(metadata)}
    starts, end = {}, 0
    for name, (dtype, shape) in tensors.items():
        start, end = end, end + prod(shape) * int(dtype[1:]) // 8
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
        starts[name] = start
    text = json.dumps(entries, separators=(",", ":") if compact else None).encode()
    text = text.ljust(json_bytes or -(-len(text) // ALIGNMENT) * ALIGNMENT)
    assert not json_bytes or len(text) == json_bytes
    first = LENGTH_BYTES + len(text)
    return Header(
        len(text).to_bytes(LENGTH_BYTES, "little") + text,
        {name: first + start for name, start in starts.items()},
        first + end,
    )
