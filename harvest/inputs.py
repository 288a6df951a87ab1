"""The files of a corpus: found in a folder or a bucket of S3, identified, opened."""

from __future__ import annotations

import gzip
import io
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePath
from typing import IO, NamedTuple

import xxhash

from store.errors import InputError
from store.objects import hash_stream

S3 = "s3://"
COMPRESSED = (".gz", ".zst")
SUFFIXES = (
    *(".txt", ".jsonl", ".csv", ".parquet"),
    *(kind + packed for packed in COMPRESSED for kind in (".txt", ".jsonl", ".csv")),
)

WHOLE_FILE_BYTES = 64 << 20
WHOLE_CORPUS_BYTES = 4 << 30
SAMPLED_FILE_BYTES = 4 << 20
SAMPLE_END_BYTES = 1 << 20
SAMPLE_BLOCK_BYTES = 64 << 10
SAMPLE_BLOCKS = 16


class TextFile(NamedTuple):
    """A file to read: what documents call it, where it is, and how large; an ETag on S3 only."""

    source: str
    where: str
    size: int
    etag: str | None = None


def find_files(path: Path) -> list[TextFile]:
    """The files under a local path, in the order they are read: that of their names."""
    if path.is_file():
        if not file_format(path.name):
            raise InputError(
                f"{path} has the suffix {path.suffix or '(none)'}, expected one of "
                f"{', '.join(SUFFIXES)}; rename or convert the file."
            )
        return [TextFile(path.name, str(path), path.stat().st_size)]
    found = [
        file.relative_to(path)
        for file in path.rglob("*")
        if file_format(file.name) and file.is_file()
    ]
    shown = sorted(file.as_posix() for file in found if not _hidden(file))
    if not shown:
        raise InputError(
            f"The folder {path} holds no file to read, expected at least one ending in "
            f"{', '.join(SUFFIXES)}; check the path."
        )
    return [TextFile(name, str(path / name), (path / name).stat().st_size) for name in shown]


def find_objects(url: str) -> list[TextFile]:
    """The object at an s3:// URL, or those under it as a prefix, in the order they are read."""
    from store.s3 import list_inputs

    prefix = url.rstrip("/") + "/"
    found = []
    for where, size, etag in list_inputs(url):
        source = PurePath(where).name if where == url else where.removeprefix(prefix)
        found.append(TextFile(source, where, size, etag))
    shown = [f for f in found if file_format(f.where) and not _hidden(PurePath(f.source))]
    if not shown:
        raise InputError(
            f"There is nothing to read at {url}, expected at least one object ending in "
            f"{', '.join(SUFFIXES)}; check the bucket and the prefix."
        )
    return sorted(shown)


def _hidden(file: PurePath) -> bool:
    return any(part.startswith(".") for part in file.parts)


def fingerprint(files: list[TextFile]) -> str:
    """Identity of some files: xxh3-128, in hex, of their names, sizes and contents.

    A file of up to 64 MiB counts with all its bytes (up to 4 MiB where all the files together
    have more than 4 GiB); a larger one with its first and last MiB and 16 blocks of 64 KiB at even
    distances. An object of S3 counts with its ETag, and is not read.
    """
    whole = WHOLE_FILE_BYTES
    if sum(file.size for file in files) > WHOLE_CORPUS_BYTES:
        whole = SAMPLED_FILE_BYTES
    digest = xxhash.xxh3_128()
    for file in files:
        size, content = file.size, file.etag
        if content is None:
            with opened(file, compressed=False) as stream:
                try:
                    if file.size <= whole:
                        size, content = hash_stream(stream)
                    else:
                        content = _sampled(stream, file.size)
                except OSError as error:
                    raise unreadable(file.where, error) from error
        digest.update(json.dumps([file.source, size, content]).encode())
    return digest.hexdigest()


def _sampled(stream: IO[bytes], size: int) -> str:
    """xxh3-128 of both ends of a large file, and of blocks at even distances in between."""
    last = size - SAMPLE_END_BYTES
    spans = [(0, SAMPLE_END_BYTES), (last, SAMPLE_END_BYTES)]
    for block in range(1, SAMPLE_BLOCKS + 1):
        spans.append((last * block // (SAMPLE_BLOCKS + 1), SAMPLE_BLOCK_BYTES))
    digest = xxhash.xxh3_128()
    for start, length in spans:
        stream.seek(start)
        digest.update(stream.read(length))
    return "sampled:" + digest.hexdigest()


def file_format(name: str) -> str:
    """The suffix that decides how a file is read, compression taken off; empty if unknown."""
    name = name.lower()
    if not name.endswith(SUFFIXES):
        return ""
    return PurePath(name.removesuffix(".gz").removesuffix(".zst")).suffix


@contextmanager
def opened(file: TextFile, compressed: bool = True) -> Iterator[IO[bytes]]:
    """The file's bytes; with `compressed`, those of a .gz or .zst file are its contents."""
    name = file.where.lower()
    with _opened(file) as stream:
        if compressed and name.endswith(".gz"):
            yield io.BufferedReader(gzip.GzipFile(fileobj=stream))
        elif compressed and name.endswith(".zst"):
            import pyarrow as pa

            yield io.BufferedReader(pa.CompressedInputStream(stream, "zstd"))
        else:
            yield stream


def _opened(file: TextFile) -> IO[bytes]:
    if file.where.startswith(S3):
        from store.s3 import open_input

        return open_input(file.where)
    try:
        return Path(file.where).open("rb")
    except OSError as error:
        raise InputError(
            f"{file.where} cannot be read ({error.strerror}); check the file."
        ) from error


def unreadable(where: str, error: Exception) -> InputError:
    return InputError(f"{where} cannot be read ({error}); the file is damaged or cut short.")
