"""The place of a store's objects. Each object is published once, whole and durably.

A *place* is a folder, or `s3://bucket/prefix` (see `store.s3`). A reader sees an object complete
or not at all. On a local disk an object is written under a temporary name, flushed, and
given its final name, which fails if that name is taken (see `common.atomic`). No key leads out of
its place: names with `..` are refused, and so are writes into a folder that is a link.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Protocol

import numpy as np
import xxhash

from sae_harvest.common.atomic import (
    TEMPORARY_SUFFIX,
    Buffer,
    NoExclusiveNamesError,
    sync_folder,
    write_object,
)
from sae_harvest.common.errors import InputError, NotAStoreError, StoreError
from sae_harvest.common.locks import is_held
from sae_harvest.common.parsing import safe_name
from sae_harvest.common.paths import absolute
from sae_harvest.common.units import size_text

HASH_BLOCK_BYTES = 8 << 20


class Objects(Protocol):
    """Named bytes at one place. Picklable, cheap to make, thread-safe.

    A failed write raises `StoreError`. Reading a missing object raises `FileNotFoundError`; any
    other failure to read raises `StoreError`.
    """

    place: str  # absolute path, or s3://bucket/prefix; for messages

    def publish(self, key: str, pieces: Sequence[Buffer]) -> bool:
        """Write an object durably from pieces. Return False if the key exists already.

        An existing object is neither success nor failure: the caller reads it and decides.
        """
        ...

    def replace(self, key: str, pieces: Sequence[Buffer]) -> None:
        """Write or overwrite an object in one step, for repairs and replaceable objects."""
        ...

    def read(self, key: str) -> bytes: ...

    def read_range(
        self, key: str, start: int, length: int, into: memoryview | None = None
    ) -> Buffer:
        """Return `length` bytes of an object from `start`; fewer if it ends before.

        Args:
            into: at least `length` bytes of memory that may hold the result.
        """
        ...

    def size(self, key: str) -> int | None:
        """Return the size of an object in bytes; None if it does not exist."""
        ...

    def keys(self, prefix: str) -> list[str]:
        """Return the keys that begin with `prefix`, sorted, without temporary files."""
        ...

    def first_key(self) -> str | None:
        """Return any one key, None if there is none. Does not list a large place."""
        ...

    def remove(self, key: str) -> None:
        """Remove an object, if it exists."""
        ...

    def prune(self) -> None:
        """Remove empty folders. Buckets have none."""
        ...

    def leftovers(self) -> list[str]:
        """Return the keys of temporary files of killed writers. They may be removed."""
        ...

    def free_bytes(self) -> int | None:
        """Return the free space in bytes; None if no limit is known."""
        ...


def open_objects(place: str | Path) -> Objects:
    """Return the objects at a place: a folder (it may not exist yet) or `s3://bucket/prefix`."""
    name = str(place)
    scheme, separator, _ = name.partition("://")
    if not separator:
        return LocalObjects(Path(name))
    if scheme != "s3":
        raise InputError(
            f"--store {name}: a store lives in a folder or at s3://bucket/prefix, not at "
            f"{scheme}://."
        )
    from sae_harvest.store.s3 import S3Objects

    return S3Objects(name)


def require_space(objects: Objects, need: float, remedy: str) -> None:
    """Raise `StoreError` if a place has no room for `need` more bytes.

    Args:
        remedy: advice besides freeing space, for example "choose another --out".
    """
    free = objects.free_bytes()
    if free is not None and need > free:
        raise StoreError(
            f"{objects.place} needs {size_text(need)} more and the disk has {size_text(free)} "
            f"free; free some space, {remedy}."
        )


class LocalObjects:
    """Objects as files under a folder."""

    def __init__(self, root: Path) -> None:
        self._root = Path(absolute(str(root)))
        self.place = str(self._root)

    def publish(self, key: str, pieces: Sequence[Buffer]) -> bool:
        final = self._inside(key)
        if self.size(key) is not None:
            self._settle(key, final.parent)
            return False
        return self._write(key, final, pieces, overwrite=False)

    def replace(self, key: str, pieces: Sequence[Buffer]) -> None:
        self._write(key, self._inside(key), pieces, overwrite=True)

    def read(self, key: str) -> bytes:
        path = self._path(key)
        try:
            _require_file(path.stat())
            return path.read_bytes()
        except NotADirectoryError as error:
            raise FileNotFoundError(key) from error
        except FileNotFoundError:
            raise
        except OSError as error:
            raise self._unreadable(key, error) from error

    def read_range(
        self, key: str, start: int, length: int, into: memoryview | None = None
    ) -> Buffer:
        path = self._path(key)
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # do not wait for a pipe
            try:
                found = os.fstat(descriptor)
                _require_file(found)
                length = max(0, min(length, found.st_size - start))
                # new memory is not cleared first, as a bytearray would be
                buffer = np.empty(length, np.uint8).data if into is None else into[:length]
                filled = _read_all(descriptor, buffer, start)
            finally:
                os.close(descriptor)
        except (FileNotFoundError, NotADirectoryError) as error:
            raise FileNotFoundError(key) from error
        except OSError as error:
            raise self._unreadable(key, error) from error
        return buffer[:filled]

    def size(self, key: str) -> int | None:
        try:
            return self._path(key).stat().st_size
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            raise self._unreadable(key, error) from error

    def keys(self, prefix: str) -> list[str]:
        found = self._files(prefix.rpartition("/")[0])
        return sorted(key for key in found if key.startswith(prefix) and not _is_temporary(key))

    def first_key(self) -> str | None:
        if self._root.exists() and not self._root.is_dir():
            raise NotAStoreError(f"{self.place} is a file; --store takes a folder.")
        return next((key for key in self._files("") if not _is_temporary(key)), None)

    def remove(self, key: str) -> None:
        path = self._inside(key)
        try:
            path.unlink(missing_ok=True)
            if path.parent.exists():
                sync_folder(path.parent)
        except OSError as error:
            raise StoreError(f"Cannot remove {key} from {self.place}: {error.strerror}.") from error

    def prune(self) -> None:
        for folder, _, _ in os.walk(self._root, topdown=False):
            with contextlib.suppress(OSError):  # not empty
                Path(folder).rmdir()

    def leftovers(self) -> list[str]:
        temporary = {key: self._root / key for key in self._files("") if _is_temporary(key)}
        # a writer that is alive holds its file, and may finish it meanwhile
        return sorted(k for k, path in temporary.items() if not is_held(path) and path.exists())

    def free_bytes(self) -> int | None:
        folder = next(p for p in (self._root, *self._root.parents) if p.exists())
        return shutil.disk_usage(folder).free

    def _path(self, key: str) -> Path:
        """Return the file of an object.

        Raise `StoreError` for a key that leads out of the place.
        """
        try:
            return self._root / safe_name(key)
        except ValueError as error:
            raise StoreError(f"{self.place} holds no such object: {error}.") from None

    def _inside(self, key: str) -> Path:
        """Return the file of an object to change. Raise `StoreError` if a link leads elsewhere."""
        path = self._path(key)
        root, folder = os.path.realpath(self._root), os.path.realpath(path.parent)
        if os.path.commonpath([root, folder]) != root:
            raise StoreError(
                f"{path.parent} is a link to {folder}, outside of {self.place}; nothing is written "
                "or removed there. Put a folder in its place, or link the whole place."
            )
        return path

    def _write(self, key: str, final: Path, pieces: Sequence[Buffer], overwrite: bool) -> bool:
        try:
            return write_object(final, pieces, overwrite=overwrite)
        except NotADirectoryError as error:
            raise NotAStoreError(f"{self.place} is a file; --store takes a folder.") from error
        except NoExclusiveNamesError as error:
            raise StoreError(
                f"The file system of {self.place} has neither hard links nor a rename that leaves "
                "an existing file alone, so that two writers could overwrite each other; choose a "
                "place on another file system."
            ) from error
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise StoreError(
                    f"No space left on the disk of {self.place}: {key} needs "
                    f"{total_bytes(pieces):,} bytes. "
                    "What is committed is safe; free some space and run the same command again."
                ) from error
            raise StoreError(f"Cannot write {key} into {self.place}: {error.strerror}.") from error

    def _settle(self, key: str, folder: Path) -> None:
        """Flush an existing name: its writer may have been killed before flushing it."""
        try:
            sync_folder(folder)
        except OSError as error:
            raise StoreError(f"Cannot write {key} into {self.place}: {error.strerror}.") from error

    def _files(self, under: str) -> Iterator[str]:
        """Yield the keys of all files below a folder, temporary files included."""

        def refuse(error: OSError) -> None:
            if not isinstance(error, FileNotFoundError | NotADirectoryError):
                raise self._unreadable(f"the folder {error.filename}", error)

        for folder, _, files in os.walk(self._root / under, onerror=refuse):
            relative = Path(folder).relative_to(self._root)
            yield from ((relative / file).as_posix() for file in sorted(files))

    def _unreadable(self, key: str, error: OSError) -> StoreError:
        return StoreError(f"Cannot read {key} of {self.place}: {error.strerror}.")


def total_bytes(pieces: Sequence[Buffer]) -> int:
    """Return the total size of pieces in bytes."""
    return sum(memoryview(piece).nbytes for piece in pieces)


def content_hash(pieces: Sequence[Buffer]) -> str:
    """Return the xxh3-128 of pieces, in hex: the hash of objects in commit records."""
    digest = xxhash.xxh3_128()
    for piece in pieces:
        digest.update(piece)
    return digest.hexdigest()


def hash_stream(stream: IO[bytes]) -> tuple[int, str]:
    """Return the size in bytes and the xxh3-128 (hex) of a stream, read block by block."""
    digest, size = xxhash.xxh3_128(), 0
    while block := stream.read(HASH_BLOCK_BYTES):
        digest.update(block)
        size += len(block)
    return size, digest.hexdigest()


def file_hash(path: Path) -> str:
    """Return the xxh3-128 of a file's bytes, in hex."""
    with path.open("rb") as file:
        return hash_stream(file)[1]


def _require_file(found: os.stat_result) -> None:
    """Raise `OSError` unless it is a regular file: reading a pipe or a device may never end."""
    if not stat.S_ISREG(found.st_mode):
        raise OSError(errno.EINVAL, "It is not a file")


def _is_temporary(key: str) -> bool:
    return key.rpartition("/")[2].startswith(".") and key.endswith(TEMPORARY_SUFFIX)


def _read_all(descriptor: int, view: memoryview, start: int) -> int:
    filled = 0
    while filled < len(view) and (got := os.preadv(descriptor, [view[filled:]], start + filled)):
        filled += got
    return filled
