"""Where this project keeps what it can make again: converted models, compiled kernels."""

from __future__ import annotations

import os
from pathlib import Path


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
