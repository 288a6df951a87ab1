"""The files of a corpus in a folder or an S3 bucket, and those left out, with the reason."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable
from pathlib import Path, PurePath
from typing import NamedTuple

from sae_harvest.common.errors import InputError
from sae_harvest.harvest.text.documents import LeftOut
from sae_harvest.harvest.text.inputs import SUFFIXES, TextFile, file_format

MAX_NAMES = 5  # names per reason in a sentence for the terminal

OTHER_ENDING = "files with this ending are not read"
HIDDEN = "hidden"


class CorpusFiles(NamedTuple):
    """The contents of a folder or of a prefix in a bucket."""

    files: list[TextFile]
    """The files to read, in the order of their names."""
    left_out: list[LeftOut]
    """The entries that are not read."""


def find_files(path: Path) -> CorpusFiles:
    """Find the file at a local path, or all files with a known ending in a folder tree.

    Links are followed; a folder that is reached twice is read only once.
    """
    if path.is_file():
        if not file_format(path.name):
            raise InputError(
                f"{path} has the suffix {path.suffix or '(none)'}, expected one of "
                f"{', '.join(SUFFIXES)}; rename or convert the file."
            )
        return CorpusFiles([_text_file(path.name, path, path.stat())], [])
    files: list[TextFile] = []
    left_out: list[LeftOut] = []
    folders = [("", path)]
    top = path.stat()
    paths = {(top.st_dev, top.st_ino): str(path)}
    while folders:
        above, folder = folders.pop()
        inner = []
        for entry in _listed(folder):
            name = above + entry.name
            try:
                about = entry.stat()
            except OSError as error:
                about, reason = None, error.strerror or str(error)
            if not _is_text(name):
                left_out.append(LeftOut(ascii(name)[1:-1], "the name is not UTF-8"))
            elif entry.name.startswith("."):
                left_out.append(LeftOut(name, HIDDEN))
            elif about is None:
                why = f"a broken link ({reason})" if entry.is_symlink() else reason
                left_out.append(LeftOut(name, why))
            elif stat.S_ISDIR(about.st_mode):
                place = about.st_dev, about.st_ino
                if place in paths:
                    left_out.append(LeftOut(name, f"the same folder as {paths[place]}"))
                else:
                    paths[place] = name
                    inner.append((f"{name}/", Path(entry.path)))
            elif not stat.S_ISREG(about.st_mode):
                left_out.append(LeftOut(name, "neither a file nor a folder"))
            elif not file_format(entry.name):
                left_out.append(LeftOut(name, OTHER_ENDING))
            else:
                files.append(_text_file(name, Path(entry.path), about))
        folders += reversed(inner)
    if not files:
        raise InputError(
            f"The folder {path} holds no file to read, expected at least one ending in "
            f"{', '.join(SUFFIXES)}; check the path.{_also(left_out)}"
        )
    return CorpusFiles(sorted(files), left_out)


def find_objects(url: str) -> CorpusFiles:
    """Find the object at an s3:// URL, or all objects under it as a prefix."""
    from sae_harvest.store.s3 import list_inputs

    prefix = url.rstrip("/") + "/"
    files: list[TextFile] = []
    left_out: list[LeftOut] = []
    for where, size, etag in list_inputs(url):
        source = PurePath(where).name if where == url else where.removeprefix(prefix)
        if any(part.startswith(".") for part in PurePath(source).parts):
            left_out.append(LeftOut(source, HIDDEN))
        elif not file_format(where):
            left_out.append(LeftOut(source, OTHER_ENDING))
        else:
            files.append(TextFile(source, where, size, etag))
    if not files:
        raise InputError(
            f"There is nothing to read at {url}, expected at least one object ending in "
            f"{', '.join(SUFFIXES)}; check the bucket and the prefix.{_also(left_out)}"
        )
    return CorpusFiles(sorted(files), left_out)


def left_out_sentence(
    corpus: str, left_out: Iterable[LeftOut], max_names: int | None = MAX_NAMES
) -> str:
    """List what is left out of a corpus, by reason, up to `max_names` each; may be empty."""
    reasons: dict[str, list[str]] = {}
    for name, why in left_out:
        reasons.setdefault(why, []).append(name)
    parts = []
    for why, names in sorted(reasons.items()):
        n_more = len(names[max_names:]) if max_names else 0
        more = f" and {n_more:,} more" if n_more else ""
        parts.append(f"{', '.join(names[:max_names])}{more} ({why})")
    return f"Left out of {corpus}: {'; '.join(parts)}." if parts else ""


def _also(left_out: list[LeftOut]) -> str:
    return f" {sentence}" if (sentence := left_out_sentence("it", left_out)) else ""


def _listed(folder: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return sorted(entries, key=lambda entry: entry.name)
    except OSError as error:
        raise InputError(
            f"The folder {folder} cannot be listed ({error.strerror}); make it readable, or "
            "remove it from the corpus."
        ) from error


def _text_file(source: str, path: Path, about: os.stat_result) -> TextFile:
    return TextFile(source, str(path), about.st_size, modified=about.st_mtime_ns)


def _is_text(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True
