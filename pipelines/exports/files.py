"""JSON and gzip files, the same bytes for the same content."""

from __future__ import annotations

import gzip
import io
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

LEVEL = 5


def json_bytes(value: Any) -> bytes:
    """Compact, in ASCII, so that no line of a text ends a line of the file."""
    return json.dumps(value, separators=(",", ":"), allow_nan=False).encode("ascii")


def gzipped(data: bytes) -> bytes:
    """Without a time."""
    return gzip.compress(data, LEVEL, mtime=0)


def write_lines(path: Path, records: Iterable[dict[str, Any]]) -> None:
    """JSON Lines; gzipped if the name ends in .gz."""
    lines = io.BytesIO()
    for record in records:
        lines.write(json_bytes(record) + b"\n")
    data = lines.getvalue()
    path.write_bytes(gzipped(data) if path.suffix == ".gz" else data)
