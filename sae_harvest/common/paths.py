"""Paths: making users' paths absolute, and opening files by their exact name."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pyarrow as pa


def exact_file(path: Path, mode: str = "rb") -> pa.NativeFile:
    """Return an open file for pyarrow, which would misread `s3:/a`, `file:/a` or `~/a`.

    Args:
        path: path of the file.
        mode: `rb` to read, `wb` to write a new file.

    Raises:
        OSError: it cannot be opened.
    """
    import pyarrow as pa  # not needed to find the cache folder

    return pa.OSFile(os.fsencode(path), mode)


def absolute(place: str) -> str:
    """Return an absolute path with `~` expanded; an address such as s3://bucket/prefix unchanged.

    Symbolic links are not resolved.
    """
    if "://" in place:
        return place
    path = Path(place)
    with contextlib.suppress(RuntimeError):  # no such user: `~name` is the name of a file
        path = path.expanduser()
    return str(path.absolute())


def absolute_name(name: str) -> str:
    """Make a path absolute; keep a name on the Hugging Face Hub unchanged.

    A path exists, or begins with `/`, `.` or `~`.
    """
    is_path = name.startswith(("/", ".", "~"))
    return absolute(name) if is_path or exists(Path(name)) else name


def exists(path: Path) -> bool:
    """True if a path exists; False also for an impossible path."""
    try:
        return path.exists()
    except (OSError, ValueError):
        return False


def shown(place: str | Path) -> str:
    """Return a path for people: relative if it is in the current folder, else absolute."""
    path, here = Path(place), Path.cwd()
    return str(path.relative_to(here)) if path.is_relative_to(here) else str(place)
