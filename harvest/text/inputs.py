"""The files of a corpus: identified, opened, and watched for changes while they are read."""

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
READ_BYTES = 256 << 10  # between two looks at a file that must not change

ZST_WINDOW = "128 MiB"  # the largest that zstd reads unless it is told otherwise
ZST_WINDOW_ERROR = "too much memory"  # in zstd's words


class TextFile(NamedTuple):
    """A file to read."""

    source: str
    """Its name in documents."""
    where: str
    """Path, or s3:// URL."""
    size: int
    """Bytes."""
    etag: str | None = None
    """ETag of an object of S3."""
    modified: int | None = None
    """Time of the last write to a local file, in ns since 1970."""


def fingerprint(contents: list[tuple[str, int, str]]) -> str:
    """Identity of some files, given the `content` of each: xxh3-128, in hex."""
    digest = xxhash.xxh3_128()
    for content in contents:
        digest.update(json.dumps(content).encode())
    return digest.hexdigest()


def contents(files: list[TextFile]) -> list[tuple[str, int, str]]:
    """Name, size and identity of the content of each file.

    A file of up to 64 MiB counts with all its bytes (up to 4 MiB where all the files together
    have more than 4 GiB); a larger one with its first and last MiB and 16 blocks of 64 KiB at even
    distances. An object of S3 counts with its ETag, and is not read.
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
    suffix = PurePath(name.removesuffix(".gz").removesuffix(".zst")).suffix
    return ALIASES.get(suffix, suffix)


@contextmanager
def opened(file: TextFile, compressed: bool = True) -> Iterator[IO[bytes]]:
    """The file's bytes; with `compressed`, those of a .gz or .zst file are its contents.

    Raises InputError, here and from any read, if the file is not what it was when it was found:
    what was read before that is what the file then held.
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
            require_unchanged(file)  # one that is being rewritten looks damaged
            raise
        require_unchanged(file)


def require_unchanged(file: TextFile) -> None:
    """`InputError` if a local file has another size or time than when it was found, or is gone."""
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
    """The error that a file is not what it was; `how` says in what."""
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
    """A local file that must stay as it was found; it is looked at after every read.

    A system notes the time of a write before its bytes can be read, so what has been read and
    found unchanged is what the file held.
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
            "its window; decompress it with `zstd -d --long=31`, and harvest what comes out."
        )
    return InputError(f"{where} cannot be read ({error}); the file is damaged or cut short.")
