"""Paths: the cache folder, and files opened by their exact name.

The cache folder is where this project keeps what it can make again: converted models, compiled
kernels.
"""

from __future__ import annotations

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
