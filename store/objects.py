"""Objects on a local disk: published once, whole, durable; never overwritten.

A reader sees an object either complete or not at all: it is written under a temporary name,
flushed to disk, and linked to its final name, which fails if that name is taken.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
from pathlib import Path
from typing import IO

import xxhash

from store.errors import StoreError

TEMPORARY_SUFFIX = ".tmp"
HASH_BLOCK_BYTES = 8 << 20


def publish(root: Path, key: str, data: bytes | memoryview) -> bool:
    """Write `data` as object `key`, durably. False if the object was already there.

    *Already there* is neither success nor failure: the caller reads it back and decides.
    """
    final = root / key
    if final.exists():
        return False
    temporary = final.parent / f".{final.name}.{os.getpid()}-{secrets.token_hex(4)}"
    temporary = temporary.with_name(temporary.name + TEMPORARY_SUFFIX)
    try:
        make_folder(final.parent)
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        try:
            _write_all(descriptor, data)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        try:
            os.link(temporary, final)
        except FileExistsError:
            return False
        sync_folder(final.parent)
        return True
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise StoreError(
                f"No space left on the disk of {root}: {key} needs {len(data):,} bytes. "
                "What is committed is safe; free some space and run the same command again."
            ) from error
        raise StoreError(f"Cannot write {key} into {root}: {error.strerror}.") from error
    finally:
        with contextlib.suppress(OSError):  # never made, or it stays among the leftovers
            temporary.unlink()


def make_folder(folder: Path) -> None:
    """Create a folder with its parents, durably: the parent's entry is flushed as well."""
    if folder.is_dir():
        return
    make_folder(folder.parent)
    with contextlib.suppress(FileExistsError):
        folder.mkdir()
    sync_folder(folder.parent)


def content_hash(data: bytes | memoryview) -> str:
    """xxh3-128 in hex, the hash of every object in a commit record."""
    return xxhash.xxh3_128_hexdigest(data)


def hash_stream(stream: IO[bytes]) -> tuple[int, str]:
    """Bytes and xxh3-128 (hex) of a stream, read block by block."""
    digest, size = xxhash.xxh3_128(), 0
    while block := stream.read(HASH_BLOCK_BYTES):
        digest.update(block)
        size += len(block)
    return size, digest.hexdigest()


def file_hash(path: Path) -> str:
    """xxh3-128 of a file's bytes, in hex."""
    with path.open("rb") as file:
        return hash_stream(file)[1]


def leftovers(root: Path) -> list[Path]:
    """Temporary files of writers that were killed; they are not data and may be removed."""
    return sorted(root.rglob(f".*{TEMPORARY_SUFFIX}"))


def _write_all(descriptor: int, data: bytes | memoryview) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]


def sync_folder(folder: Path) -> None:
    """Make names created or renamed in the folder last through a power cut."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
