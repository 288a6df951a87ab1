"""Give a finished file its name in one step, without ever taking the name from another file.

A hard link does that on most file systems. Where there are none, as on exFAT, FAT and some network
mounts, Linux can rename a file on the condition that the new name is free, as safely. A file
system that can do neither is refused: every other way may overwrite a file, or leave half of one.
"""

from __future__ import annotations

import ctypes
import errno
import os
from pathlib import Path

NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)
NO_CONDITIONS = (*NO_LINKS, errno.EINVAL)

_AT_FDCWD, _RENAME_NOREPLACE = -100, 1  # of fcntl.h and stdio.h


class NoExclusiveNamesError(OSError):
    """The file system can give a file a name only by overwriting what has it."""


def give_name(temporary: Path, final: Path) -> bool:
    """Give the file its final name. True if it got the name; False if that is taken.

    Args:
        temporary: the file's name so far, in the folder of `final`; it may be gone afterwards.

    Raises:
        NoExclusiveNamesError: the file system cannot do it; nothing has changed.
        OSError: it failed for another cause.
    """
    try:
        os.link(temporary, final)
    except FileExistsError:
        return False
    except OSError as error:
        if error.errno not in NO_LINKS:
            raise
        return _renamed(temporary, final)
    return True


def _renamed(temporary: Path, final: Path) -> bool:
    """`give_name` by Linux's renameat2, after which the temporary name is gone."""
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except AttributeError:  # of a C library that is older than the call
        raise NoExclusiveNamesError(errno.ENOSYS, os.strerror(errno.ENOSYS)) from None
    names = os.fsencode(temporary), os.fsencode(final)
    if rename(_AT_FDCWD, names[0], _AT_FDCWD, names[1], _RENAME_NOREPLACE) == 0:
        return True
    code = ctypes.get_errno()
    if code == errno.EEXIST:
        return False
    kind = NoExclusiveNamesError if code in NO_CONDITIONS else OSError
    raise kind(code, os.strerror(code), str(final))
