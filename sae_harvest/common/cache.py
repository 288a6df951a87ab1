"""The cache folder.

It holds logs of harvests, converted models and compiled kernels. They can be made again: no store,
run or table depends on them.
"""

from __future__ import annotations

import atexit
import errno
import functools
import os
import shutil
import sys
import tempfile
from pathlib import Path

from sae_harvest.common.errors import InputError
from sae_harvest.common.paths import absolute

PROBE_BYTES = 1 << 20  # a cache folder with less room counts as full


def configured_cache_dir() -> Path | None:
    """Return SAE_HARVEST_CACHE, or the user's cache folder + sae-harvest; None without a home.

    The folder may not exist, and may not be writable.
    """
    if chosen := os.environ.get("SAE_HARVEST_CACHE"):
        return Path(absolute(chosen))  # workers run in another folder
    if base := os.environ.get("XDG_CACHE_HOME"):
        return Path(base).absolute() / "sae-harvest"
    try:
        return Path.home().absolute() / ".cache" / "sae-harvest"
    except RuntimeError:
        return None


def cache_dir() -> Path:
    """Return the cache folder, or a temporary one for this process if it cannot be written.

    A temporary folder is reported once, in one line on standard error.

    Raises:
        InputError: no temporary folder can be written either.
    """
    return _writable(configured_cache_dir())


def kept_cache_dir() -> Path | None:
    """Return the cache folder, None if it is temporary, which is reported as in `cache_dir`."""
    configured = configured_cache_dir()
    return configured if cache_dir() == configured else None


def use_numba_cache() -> None:
    """Let numba keep compiled kernels in our cache folder. Call before numba is imported.

    Numba's default is the folder of the source, which may be read-only.
    """
    chosen = os.environ.get("NUMBA_CACHE_DIR")
    folder = _writable(Path(chosen).absolute()) if chosen else cache_dir() / "numba"
    os.environ["NUMBA_CACHE_DIR"] = str(folder)


@functools.cache
def _writable(folder: Path | None) -> Path:
    """Return the folder, created if missing, or a temporary one if it cannot be written."""
    problem = "there is no home folder" if folder is None else _problem(folder)
    if folder is not None and problem is None:
        return folder
    try:
        temporary = Path(tempfile.mkdtemp(prefix="sae-harvest-"))
    except OSError as error:
        raise InputError(
            f"{folder or 'The cache folder'} cannot be written ({problem}), and no temporary "
            f"folder either ({error.strerror}); set SAE_HARVEST_CACHE to a folder that can."
        ) from None
    atexit.register(_remove, temporary, os.getpid())
    print(
        f"Note: {folder or 'the cache folder'} cannot be written ({problem}): compiled kernels, "
        "converted models and logs are not kept; set SAE_HARVEST_CACHE to a folder that can be.",
        file=sys.stderr,
    )
    return temporary


def _problem(folder: Path) -> str | None:
    """Return the reason why a folder cannot be written, None if it can."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as probe:
            os.posix_fallocate(probe.fileno(), 0, PROBE_BYTES)
    except OSError as error:
        if error.errno in (errno.EOPNOTSUPP, errno.EINVAL):  # a file system without allocation
            return None
        return error.strerror or type(error).__name__
    return None


def _remove(folder: Path, owner: int) -> None:
    """Remove a temporary folder at the end of the process that made it, not of a fork of it."""
    if os.getpid() == owner:
        shutil.rmtree(folder, ignore_errors=True)
