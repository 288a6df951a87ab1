"""Locks on files: one process holds a lock at a time, and a killed process releases it.

They are kernel locks (`flock`). Some network file systems have none; docs/jobs.md says so.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
from collections.abc import Iterator
from pathlib import Path

from sae_harvest.common.atomic import TEMPORARY_SUFFIX, make_folder
from sae_harvest.common.errors import RunError

LOCK_FILE = ".lock"
NO_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL)


class HeldError(Exception):
    """Another process holds the lock."""


@contextlib.contextmanager
def lock(path: Path, wait: bool = False) -> Iterator[None]:
    """Hold the lock of a file while the block runs. The file is created if missing.

    On a file system without locks the block runs without a lock.

    Args:
        wait: whether to wait for the process that holds the lock.

    Raises:
        HeldError: another process holds it.
    """
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except OSError as error:
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                raise HeldError from error
            if error.errno not in NO_LOCKS:
                raise
        yield


def is_held(path: Path) -> bool:
    """True if a process holds the lock of a file, or if that is unknown; False without a file."""
    try:
        with path.open("r+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except OSError:
        return True
    return False


@contextlib.contextmanager
def claimed(out: Path, record: str, foreign: str = "", busy: str = "") -> Iterator[None]:
    """Hold a folder while the block runs. The folder is created if missing.

    Args:
        out: the folder.
        record: name of the file that describes the folder's content. Without it the folder may
            hold only locks and temporary files, from a process killed at its start.
        foreign: error message for a folder with other files; empty for a general one.
        busy: error message for a folder that another process holds; empty for a general one.

    Raises:
        RunError: the folder holds other files, or another process holds it.
        OSError: the folder cannot be made.
    """
    if not (out / record).exists() and out.exists() and not _is_free(out):
        raise RunError(foreign or f"{out} holds other files and no {record}; choose another --out.")
    make_folder(out.absolute())
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(lock(out / LOCK_FILE))
        except HeldError as error:
            raise RunError(
                busy
                or f"Another process is writing to {out}; wait until it has ended, or choose "
                "another --out."
            ) from error
        yield


def _is_free(out: Path) -> bool:
    """True if a folder has nothing but locks and temporary files."""
    return out.is_dir() and all(
        path.name == LOCK_FILE or path.name.endswith(TEMPORARY_SUFFIX) for path in out.iterdir()
    )
