"""Git-LFS pointers: small texts in place of large files that were not fetched."""

from __future__ import annotations

from pathlib import Path

from sae_harvest.common.errors import InputError

BEGINNING = b"version https://git-lfs.github.com/spec/v1"


def is_pointer(path: Path) -> bool:
    """True for a Git-LFS pointer; False for other files and unreadable ones."""
    try:
        with path.open("rb") as file:
            return file.read(len(BEGINNING)) == BEGINNING
    except OSError:
        return False


def refuse_pointer(path: Path) -> None:
    """Raise `InputError` if the file is a Git-LFS pointer."""
    if is_pointer(path):
        raise InputError(
            f"{path} is a Git-LFS pointer and not the file itself; run `git lfs pull` in its "
            "repository, or download the file."
        )
