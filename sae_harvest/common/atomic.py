"""Writing a file or folder so that a crash leaves the old one or the new one, whole.

A file is written in its folder under a temporary name, flushed to the disk and renamed; then the
folder's entry is flushed. Its mode follows the user's umask, even if a library creates the file
with a narrower mode (safetensors: 0600).

    replacing, write_bytes, write_text    a file of one writer, which may exist already
    making                                the same for a folder as well; errors stay OSErrors
    write_object                          a file that other processes may write as well
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import secrets
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

from sae_harvest.common.errors import RunError

Buffer = bytes | bytearray | memoryview

TEMPORARY_SUFFIX = ".tmp"
MAX_PIECES_A_CALL = 512  # limit for os.writev, which takes at most 1,024 on Linux
NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)
NO_CONDITIONS = (*NO_LINKS, errno.EINVAL)

_AT_FDCWD, _RENAME_NOREPLACE = -100, 1  # of fcntl.h and stdio.h


class NoExclusiveNamesError(OSError):
    """The file system can name a file only by overwriting an existing file of that name."""


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield the name of a new, empty file that replaces `path` when the block succeeds.

    The block must only write to this file: every OSError inside is reported as a failed write.
    After an error nothing is left of the file.

    Raises:
        RunError: the file cannot be written; names it. The OSError is its cause.
    """
    with writing(path), making(path) as temporary:
        with temporary.open("wb") as file:
            mode = os.fstat(file.fileno()).st_mode
        yield temporary
        if temporary.stat().st_mode != mode:
            temporary.chmod(mode & 0o7777)


def write_bytes(path: Path, pieces: Sequence[Buffer]) -> None:
    """Write a file from pieces. Raises RunError like `replacing`."""
    with replacing(path) as temporary, temporary.open("wb") as file:
        for piece in pieces:
            file.write(piece)


def write_text(path: Path, text: str) -> None:
    """Write a text file in UTF-8. Raises RunError like `replacing`."""
    write_bytes(path, [text.encode()])


@contextlib.contextmanager
def making(path: Path, temporary: Path | None = None) -> Iterator[Path]:
    """Yield a temporary name for a file or folder that is renamed to `path` after the block.

    After an error nothing is left. The block must flush the files in a folder itself.

    Args:
        temporary: the temporary name; by default one that depends only on `path`.
    """
    temporary = temporary or temporary_name(path)
    _remove(temporary)  # left by a killed process
    try:
        yield temporary
        if temporary.is_dir():
            temporary.rename(path)
            sync_folder(path.absolute().parent)
        else:
            publish(temporary, path)
    finally:
        _remove(temporary)


def write_object(path: Path, pieces: Sequence[Buffer], *, overwrite: bool) -> bool:
    """Write a file that other processes may write as well. Return False if the name is taken.

    The temporary name is unique to this call. The file is locked until it has its final name, so
    `locks.is_held` tells whether its writer is alive.

    Args:
        overwrite: replace an existing file.

    Raises:
        NoExclusiveNamesError: the file system cannot name a file without overwriting another.
        OSError: it failed for another cause.
    """
    own = f"{os.getpid()}-{secrets.token_hex(4)}"
    temporary = path.with_name(f".{path.name}.{own}{TEMPORARY_SUFFIX}")
    make_folder(path.parent)
    try:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        try:
            with contextlib.suppress(OSError):  # some network file systems have no locks
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            _write_all(descriptor, pieces)
            return _publish(descriptor, temporary, path, overwrite)
        finally:
            os.close(descriptor)
    finally:
        with contextlib.suppress(OSError):  # never made, renamed, or among the leftovers
            temporary.unlink()


def temporary_name(path: Path) -> Path:
    """Return the temporary name of a file that has one writer."""
    return path.with_name(f".{path.name}{TEMPORARY_SUFFIX}")


def publish(temporary: Path, path: Path) -> None:
    """Flush a written file, give it its final name, and flush the name.

    Raises:
        OSError: one of these failed.
    """
    with temporary.open("rb+") as file:
        _publish(file.fileno(), temporary, path, overwrite=True)


def new_folder(path: Path) -> None:
    """Make a folder with its parents, durably, unless it exists. Raises RunError."""
    with writing(path):
        make_folder(path.absolute())


def make_folder(folder: Path) -> None:
    """Create a folder with its parents, durably: the parent's entry is flushed as well."""
    if folder.is_dir():
        return
    make_folder(folder.parent)
    with contextlib.suppress(FileExistsError):
        folder.mkdir()
    sync_folder(folder.parent)


def sync_folder(folder: Path) -> None:
    """Make names created or renamed in the folder last through a power cut."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Report an OSError of the block as a failure to write `path`, in a RunError."""
    try:
        yield
    except OSError as error:
        raise RunError(
            f"Cannot write {path} ({error.strerror or error}); see to the disk and its "
            "permissions, then run the same command again."
        ) from error


def give_name(temporary: Path, final: Path) -> bool:
    """Give a file its final name in one step. Return False if another file has that name.

    Most file systems can do this with a hard link. On others (exFAT, FAT, some network mounts)
    Linux can rename a file on the condition that the new name is free. A file system that can do
    neither is refused, since any other way may overwrite a file or leave half of one.

    Args:
        temporary: the file's present name, in the folder of `final`; it may be gone afterwards.

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
    """Do what `give_name` does with Linux's renameat2; the temporary name is gone afterwards."""
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except AttributeError:  # the C library is older than the call
        raise NoExclusiveNamesError(errno.ENOSYS, os.strerror(errno.ENOSYS)) from None
    names = os.fsencode(temporary), os.fsencode(final)
    if rename(_AT_FDCWD, names[0], _AT_FDCWD, names[1], _RENAME_NOREPLACE) == 0:
        return True
    code = ctypes.get_errno()
    if code == errno.EEXIST:
        return False
    kind = NoExclusiveNamesError if code in NO_CONDITIONS else OSError
    raise kind(code, os.strerror(code), str(final))


def _publish(descriptor: int, temporary: Path, path: Path, overwrite: bool) -> bool:
    os.fsync(descriptor)
    if overwrite:
        temporary.replace(path)
    named = overwrite or give_name(temporary, path)
    sync_folder(path.parent)
    return named


def _write_all(descriptor: int, pieces: Sequence[Buffer]) -> None:
    views = [memoryview(piece).cast("B") for piece in pieces]
    while views:
        written = os.writev(descriptor, views[:MAX_PIECES_A_CALL])
        while views and written >= len(views[0]):
            written -= len(views.pop(0))
        if written:
            views[0] = views[0][written:]


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):  # it has its name, or was never made
            path.unlink()
