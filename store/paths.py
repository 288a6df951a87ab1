"""Paths: those that a user gives, in full; the cache folder; files opened by their exact name.

The cache folder is where this project keeps what it can make again: converted models, compiled
kernels.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pyarrow as pa


def cache_dir() -> Path:
    """The cache folder: `SAE_HARVEST_CACHE`, else `sae-harvest` under the user's cache folder.

    It is not created here; a checkout or an installation may be read-only, this folder may not.
    """
    chosen = os.environ.get("SAE_HARVEST_CACHE")
    if chosen:
        return Path(chosen).expanduser().absolute()  # workers run in another folder
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "sae-harvest"


def use_numba_cache() -> None:
    """Let numba keep compiled kernels in our cache folder. Call before numba is imported.

    Beside the source, its default, may be read-only.
    """
    os.environ.setdefault("NUMBA_CACHE_DIR", str(cache_dir() / "numba"))


def exact_file(path: Path, mode: str = "rb") -> pa.NativeFile:
    """A file for pyarrow, which would take `s3:/a`, `file:/a` or `~/a` for places elsewhere.

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
    """What may be a path or a name on the Hugging Face hub: in full if it is a path.

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
