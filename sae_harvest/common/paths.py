"""Paths: those that a user gives, in full, and files opened by their exact name."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pyarrow as pa


def exact_file(path: Path, mode: str = "rb") -> pa.NativeFile:
    """Return a file for pyarrow, which would take `s3:/a`, `file:/a` or `~/a` for places elsewhere.

    Args:
        mode: `rb` reads, `wb` writes it anew.

    Raises:
        OSError: it cannot be opened.
    """
    import pyarrow as pa  # not needed by those who only ask for the cache folder

    return pa.OSFile(os.fsencode(path), mode)


def absolute(place: str) -> str:
    """A file or folder in full, `~` expanded; an address such as s3://bucket/prefix as it is.

    Links stay links.
    """
    if "://" in place:
        return place
    path = Path(place)
    with contextlib.suppress(RuntimeError):  # no such user: it is the name of a file
        path = path.expanduser()
    return str(path.absolute())


def absolute_name(name: str) -> str:
    """Make a path absolute that may also be a name on the Hugging Face hub, which stays.

    A path is what exists, or begins with `/`, `.` or `~`.
    """
    is_path = name.startswith(("/", ".", "~"))
    return absolute(name) if is_path or exists(Path(name)) else name


def exists(path: Path) -> bool:
    """True if there is something at a path; false also for what can be no path."""
    try:
        return path.exists()
    except (OSError, ValueError):
        return False


def shown(place: str | Path) -> str:
    """A path as a person would type it here: relative if it is in this folder, else in full."""
    path, here = Path(place), Path.cwd()
    return str(path.relative_to(here)) if path.is_relative_to(here) else str(place)
