"""Locks on files: one process at a time, and a killed process holds none.

They are the kernel's own (`flock`). Some network file systems have none; docs/jobs.md says so.
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
    """Hold the lock of a file, made if it is missing, while the block runs.

    On a file system without locks the block runs all the same.

    Args:
        wait: wait for the process that holds it.

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
    """True if a process holds the lock of a file, or if nobody can tell; False without a file."""
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
    """Hold a folder, made if it is missing, while the block runs.

    Args:
        record: name of the file that says whose the folder is. Where it is missing, the folder
            may have nothing but what a process leaves that is killed at its very start.
        foreign: sentence about a folder that has more; one that suits any record if left out.
        busy: sentence about a folder that another process holds; likewise.

    Raises:
        RunError: something else is there, or another process holds the folder.
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
