"""Writing a file so that a crash leaves the old one or the new one, whole.

A file is written beside its place under a temporary name, flushed to the disk, renamed, and the
folder's entry is flushed. Its mode is the one that the user's umask gives to every new file, also
where a library creates the file itself with a narrower one (safetensors: 0600).
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from sae_harvest.common.errors import RunError
from sae_harvest.store.objects import Buffer, make_folder, sync_folder


def temporary_name(path: Path) -> Path:
    """The name under which a file is written before it gets its own."""
    return path.with_name(f".{path.name}.tmp")


def publish(temporary: Path, path: Path) -> None:
    """Flush a file that is written, give it its name, and make the name last.

    Raises:
        OSError: one of these failed.
    """
    with temporary.open("rb+") as file:
        os.fsync(file.fileno())
    temporary.replace(path)
    sync_folder(path.parent)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A new, empty file to write, which takes the place of `path` when the block ends well.

    The block only writes to the file, under the name that it is given: every OSError inside is
    reported as one of writing. After an error nothing is left of the file.

    Raises:
        RunError: the file cannot be written; names it. Its cause is the OSError.
    """
    temporary = temporary_name(path)
    with writing(path):
        try:
            with temporary.open("wb") as file:
                mode = os.fstat(file.fileno()).st_mode
            yield temporary
            if temporary.stat().st_mode != mode:
                temporary.chmod(mode & 0o7777)
            publish(temporary, path)
        finally:
            with contextlib.suppress(OSError):  # it has its name, or was never made
                temporary.unlink()


def write_bytes(path: Path, pieces: Sequence[Buffer]) -> None:
    """Write a file whose bytes are given in pieces. Raises RunError as `replacing`."""
    with replacing(path) as temporary, temporary.open("wb") as file:
        for piece in pieces:
            file.write(piece)


def write_text(path: Path, text: str) -> None:
    """Write a text file in UTF-8. Raises RunError as `replacing`."""
    write_bytes(path, [text.encode()])


def new_folder(path: Path) -> None:
    """Make a folder with its parents, durably, unless it is there. Raises RunError."""
    with writing(path):
        make_folder(path.absolute())


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
