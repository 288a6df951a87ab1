"""The files of a corpus: their identity, opening them, and noticing changes during reading."""

from __future__ import annotations

import gzip
import io
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path, PurePath
from typing import IO, Any, NamedTuple

import xxhash

from sae_harvest.common.errors import InputError
from sae_harvest.common.pointers import refuse_pointer
from sae_harvest.store.objects import hash_stream

S3 = "s3://"
COMPRESSED = (".gz", ".zst")
PACKABLE = (".txt", ".jsonl", ".ndjson", ".json", ".csv")
SUFFIXES = (
    *PACKABLE,
    *(".parquet", ".parq"),
    *(kind + packed for packed in COMPRESSED for kind in PACKABLE),
)
ALIASES = {".ndjson": ".jsonl", ".parq": ".parquet"}

WHOLE_FILE_BYTES = 64 << 20
WHOLE_CORPUS_BYTES = 4 << 30
SAMPLED_FILE_BYTES = 4 << 20
SAMPLE_END_BYTES = 1 << 20
SAMPLE_BLOCK_BYTES = 64 << 10
SAMPLE_BLOCKS = 16
READ_BYTES = 256 << 10  # bytes read between two checks that the file has not changed

ZST_WINDOW = "128 MiB"  # the largest window that zstd reads by default
ZST_WINDOW_ERROR = "too much memory"  # part of zstd's message


class TextFile(NamedTuple):
    """A file to read."""

    source: str
    """Name of the file in documents."""
    where: str
    """Path, or s3:// URL."""
    size: int
    """Bytes."""
    etag: str | None = None
    """ETag of an object of S3."""
    modified: int | None = None
    """Time of the last write to a local file, in ns since 1970."""


def fingerprint(contents: list[tuple[str, int, str]]) -> str:
    """Return the identity of some files, given the `contents` of each: xxh3-128, in hex."""
    digest = xxhash.xxh3_128()
    for content in contents:
        digest.update(json.dumps(content).encode())
    return digest.hexdigest()


def contents(files: list[TextFile]) -> list[tuple[str, int, str]]:
    """Return the name, size and identity of the content of each file.

    All bytes of a file of up to 64 MiB are hashed (up to 4 MiB if the files together have more than
    4 GiB). Of a larger file, the first and last MiB are hashed, and 16 blocks of 64 KiB at equal
    distances. For an S3 object, the ETag is used, and nothing is read.
    """
    whole_bytes = WHOLE_FILE_BYTES
    if sum(file.size for file in files) > WHOLE_CORPUS_BYTES:
        whole_bytes = SAMPLED_FILE_BYTES
    return [_content(file, whole_bytes) for file in files]


def _content(file: TextFile, whole_bytes: int) -> tuple[str, int, str]:
    if file.etag is not None:
        return file.source, file.size, file.etag
    with opened(file, compressed=False) as stream:
        try:
            if file.size <= whole_bytes:
                return file.source, *hash_stream(stream)
            return file.source, file.size, _sampled(stream, file.size)
        except OSError as error:
            raise unreadable(file.where, error) from error


def _sampled(stream: IO[bytes], size: int) -> str:
    """Compute the xxh3-128 of both ends of a large file, and of blocks at equal distances."""
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
    """Return the suffix that decides how a file is read, without .gz or .zst; empty if unknown."""
    name = name.lower()
    if not name.endswith(SUFFIXES):
        return ""
    suffix = PurePath(name.removesuffix(".gz").removesuffix(".zst")).suffix
    return ALIASES.get(suffix, suffix)


@contextmanager
def opened(file: TextFile, compressed: bool = True) -> Iterator[IO[bytes]]:
    """Open a file; with `compressed`, a .gz or .zst file is decompressed.

    Raises InputError, here and from any read, if the file has changed since it was found. Bytes
    read before that error are the unchanged content.
    """
    name = file.where.lower()
    with _opened(file) as stream:
        try:
            if compressed and name.endswith(".gz"):
                yield io.BufferedReader(gzip.GzipFile(fileobj=stream))
            elif compressed and name.endswith(".zst"):
                import pyarrow as pa

                yield io.BufferedReader(pa.CompressedInputStream(stream, "zstd"))
            else:
                yield stream
        except Exception:
            require_unchanged(file)  # a file that is being rewritten looks damaged
            raise
        require_unchanged(file)


def require_unchanged(file: TextFile) -> None:
    """Raise `InputError` if a local file is gone, or its size or time has changed."""
    if file.modified is not None:
        try:
            now = Path(file.where).stat()
        except OSError as error:
            raise InputError(
                f"{file.where} was there when this harvest began and cannot be read now "
                f"({error.strerror}); {_REMEDY}"
            ) from error
        _compare(file, now)


def changed(file: TextFile, how: str, remedy: str = "") -> InputError:
    """Make the error for a changed file; `how` says what has changed."""
    return InputError(
        f"{file.where} has changed since this harvest began, {how}; {remedy or _REMEDY}"
    )


_REMEDY = (
    "nothing of the new text is stored and nothing is sealed: put the file back as it was and run "
    "the same command again, or harvest the new text into another --store."
)


def _compare(file: TextFile, now: os.stat_result) -> None:
    if (now.st_size, now.st_mtime_ns) == (file.size, file.modified):
        return
    then = file.modified or 0
    if now.st_size != file.size:
        how = f"from {file.size:,} to {now.st_size:,} bytes"
    else:
        how = f"and was last written {_time(now.st_mtime_ns)}, not {_time(then)}"
    raise changed(file, how)


def _time(ns: int) -> str:
    return datetime.fromtimestamp(ns / 1e9).isoformat(sep=" ", timespec="milliseconds")


class _Watched(io.RawIOBase):
    """A local file that must not change; it is checked after every read.

    A system records the time of a write before its bytes can be read. So if the check finds no
    change, the bytes read are the unchanged content.
    """

    def __init__(self, file: TextFile) -> None:
        self._file = file
        self._raw = io.FileIO(file.where)
        try:
            self._look()
        except InputError:
            self._raw.close()
            raise

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._raw.tell()

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        return self._raw.seek(offset, whence)

    def readinto(self, buffer: Any) -> int | None:
        length = self._raw.readinto(buffer)
        self._look()
        return length

    def close(self) -> None:
        self._raw.close()
        super().close()

    def _look(self) -> None:
        if self._file.modified is not None:
            _compare(self._file, os.fstat(self._raw.fileno()))


def _opened(file: TextFile) -> IO[bytes]:
    if file.where.startswith(S3):
        from sae_harvest.store.s3 import open_input

        return open_input(file.where, file.etag)
    refuse_pointer(Path(file.where))
    try:
        return io.BufferedReader(_Watched(file), READ_BYTES)
    except OSError as error:
        raise InputError(
            f"{file.where} cannot be read ({error.strerror}); check the file."
        ) from error


def unreadable(where: str, error: Exception) -> InputError:
    if ZST_WINDOW_ERROR in str(error):
        return InputError(
            f"{where} was compressed so that reading it takes more than {ZST_WINDOW} of memory for "
            "its window; decompress it with `zstd -d --long=31`, and harvest the result."
        )
    return InputError(f"{where} cannot be read ({error}); the file is damaged or cut short.")
