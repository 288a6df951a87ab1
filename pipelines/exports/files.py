"""JSON and gzip files, with the same bytes for the same content, in a new folder."""

from __future__ import annotations

import gzip
import io
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sae_harvest.common.atomic import make_folder, making
from sae_harvest.common.errors import RunError

LEVEL = 5


def json_bytes(value: Any) -> bytes:
    """Encode compact JSON in ASCII, so that no line end in a text ends a line of the file."""
    try:
        return json.dumps(value, separators=(",", ":"), allow_nan=False).encode("ascii")
    except ValueError:
        raise RunError(
            "The tables hold a number that is not finite, unlike JSON; build them again."
        ) from None


def gzipped(data: bytes) -> bytes:
    """Compress without a time stamp."""
    return gzip.compress(data, LEVEL, mtime=0)


def write_lines(path: Path, records: Iterable[dict[str, Any]]) -> None:
    """Write JSON Lines; gzipped if the name ends in .gz."""
    lines = io.BytesIO()
    for record in records:
        lines.write(json_bytes(record) + b"\n")
    data = lines.getvalue()
    path.write_bytes(gzipped(data) if path.suffix == ".gz" else data)


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """Open a folder for writing; it is renamed to `out` when it is complete.

    Raises:
        RunError: `out` exists and is not empty, or cannot be written.
    """
    refusal = f"{out} holds something already; choose another --out."
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise RunError(refusal)
    final = out.absolute()
    try:
        with making(final, final.with_name(f".{final.name}.{os.getpid()}")) as folder:
            make_folder(folder)
            yield folder
    except OSError as error:
        raise RunError(
            f"Cannot write into {out}: {error.strerror or error}; "
            "choose another --out or make room there."
        ) from error
