"""Objects in a bucket that speaks S3: a store's own, and corpora to read.

`store.bucket` says where server and credentials come from, and what happens when they fail.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from contextlib import AbstractContextManager, suppress
from typing import IO, TYPE_CHECKING, Any

from obstore.exceptions import AlreadyExistsError

from sae_harvest.common.atomic import Buffer
from sae_harvest.common.errors import InputError, StoreError
from sae_harvest.common.parsing import safe_name
from sae_harvest.store.bucket import (
    GIVE_UP_SECONDS,
    SLOWEST_BYTES_A_SECOND,
    Bucket,
    passes,
    retried,
    seconds_for,
)
from sae_harvest.store.objects import total_bytes

if TYPE_CHECKING:
    from obstore import ObjectMeta, PutMode

SMALL_BYTES = GIVE_UP_SECONDS * SLOWEST_BYTES_A_SECOND
INPUT_BLOCK_BYTES = 4 << 20


class S3Objects:
    """Objects of a bucket under a prefix; `store.objects.Objects` says what each method does.

    Its state is its place: a copy in another process goes by the environment of that process.
    """

    def __init__(self, place: str) -> None:
        self._bucket = Bucket(place, StoreError)
        self._prefix = f"{self._bucket.path}/" if self._bucket.path else ""
        self.place = self._bucket.url(self._bucket.path)
        self._refuses = False  # the server is known to refuse a second object of the same key

    def __reduce__(self) -> tuple[type[S3Objects], tuple[str]]:
        return S3Objects, (self.place,)

    def publish(self, key: str, pieces: Sequence[Buffer]) -> bool:
        """Create-only: a PUT with `If-None-Match: *`, decided by the server, durable once answered.

        False may also mean that this very call wrote the object: a request whose answer was lost
        is sent again and finds what it wrote. The caller reads back and adopts, and need not tell
        the two apart. A server that overwrites in spite of the condition would lose one of two
        writers: it is found out at the first small object, which is written twice, and refused.
        """
        created = self._put(key, pieces, "create")
        if not created:
            self._refuses = True
        elif not self._refuses and total_bytes(pieces) <= SMALL_BYTES:
            if self._put(key, pieces, "create"):
                raise StoreError(
                    f"{self._bucket.endpoint} overwrote {key} of {self.place} although the request "
                    "said If-None-Match: *; keep stores on a server that honours conditional "
                    "writes, as Amazon S3 does."
                )
            self._refuses = True
        return created

    def replace(self, key: str, pieces: Sequence[Buffer]) -> None:
        self._put(key, pieces, "overwrite")

    def read(self, key: str) -> bytes:
        with self._reading(key):
            found = self._bucket.client().get(self._path(key))
            if (size := found.meta["size"]) > SMALL_BYTES:
                found = self._bucket.client(size).get(self._path(key))
            return bytes(found.bytes())

    def read_range(
        self, key: str, start: int, length: int, into: memoryview | None = None
    ) -> Buffer:
        # obstore answers in memory of its own
        if length > 0:
            with self._reading(key):
                return self._bucket.read_range(self._path(key), start, length)
        if self.size(key) is None:
            raise FileNotFoundError(key)
        return b""  # S3 knows no empty range

    def size(self, key: str) -> int | None:
        try:
            with self._reading(key):
                return self._bucket.client().head(self._path(key))["size"]
        except FileNotFoundError:
            return None

    def keys(self, prefix: str) -> list[str]:
        folder = (self._prefix + prefix).rpartition("/")[0]  # obstore lists whole segments
        with self._bucket.explained(f"list {self.place}"):
            found = self._bucket.listed(folder)
        keys = [meta["path"].removeprefix(self._prefix) for meta in found]
        return sorted(key for key in keys if key.startswith(prefix))

    def first_key(self) -> str | None:
        with self._bucket.explained(f"list the objects of {self.place}"):
            found = self._bucket.first(self._prefix.rstrip("/"))
        return None if found is None else found.removeprefix(self._prefix)

    def remove(self, key: str) -> None:
        with self._bucket.explained(f"remove {key} from {self.place}"):
            self._bucket.client().delete(self._path(key))

    def prune(self) -> None:
        """Nothing: a bucket has no folders."""

    def leftovers(self) -> list[str]:
        return []  # an object appears whole when its PUT ends, or never

    def free_bytes(self) -> int | None:
        return None

    def _path(self, key: str) -> str:
        """The object's key in the bucket; `StoreError` if it leads out of the store's place."""
        try:
            return self._prefix + safe_name(key)
        except ValueError as error:
            raise StoreError(f"{self.place} holds no such object: {error}.") from None

    def _reading(self, key: str) -> AbstractContextManager[None]:
        return self._bucket.explained(f"read {key} of {self.place}", FileNotFoundError(key))

    def _put(self, key: str, pieces: Sequence[Buffer], mode: PutMode) -> bool:
        """False if the key is taken, by us perhaps: see `publish`."""
        views = [memoryview(piece).cast("B") for piece in pieces]
        size = total_bytes(pieces)

        def put() -> bool:
            try:
                self._bucket.client(size).put(
                    self._path(key), iter(views), mode=mode, use_multipart=False
                )
            except AlreadyExistsError as error:
                if passes(error):  # 409: another write of the key is under way
                    raise
                return False
            return True

        with self._bucket.explained(f"write {key} into {self.place}"):
            return retried(put, seconds_for(size) / 2)


def list_inputs(url: str) -> list[tuple[str, int, str]]:
    """(url, bytes, etag) of the object at `url`, or else of every object below it, sorted by url.

    Raises `InputError` if there is none, or if the bucket cannot be listed.
    """
    bucket = Bucket(url, InputError)
    found: Sequence[ObjectMeta] = []
    with bucket.explained(f"list {url}"):
        if bucket.path and not url.endswith("/"):
            with suppress(FileNotFoundError):
                found = [bucket.client().head(bucket.path)]
        found = found or bucket.listed(bucket.path)
    if not found:
        raise InputError(f"There is no object at or below {url}; check the address.")
    return sorted(
        (bucket.url(meta["path"]), meta["size"], (meta["e_tag"] or "").strip('"')) for meta in found
    )


def open_input(url: str, etag: str | None = None) -> IO[bytes]:
    """Return the object at `url` as a buffered, seekable stream of bytes.

    It is read block by block, a request each, so that the consumer may take its time; if the
    object is overwritten meanwhile, that is an error. Raises `InputError`, here and while reading.

    Args:
        etag: as listed; an object with another one is an error.
    """
    return io.BufferedReader(_Input(url, etag), INPUT_BLOCK_BYTES)


class _Input(io.RawIOBase):
    """One object by ranges, all of one version."""

    def __init__(self, url: str, etag: str | None) -> None:
        self._url, self._position = url, 0
        self._bucket = Bucket(url, InputError)
        missing = InputError(f"There is no object {url}; check the address.")
        with self._bucket.explained(f"read {url}", missing):
            meta = self._bucket.client().head(self._bucket.path)
        self._size, self._etag = meta["size"], meta["e_tag"]
        if etag and (self._etag or "").strip('"') != etag:
            raise InputError(
                f"{url} has been overwritten since it was listed; put the object back as it was, "
                "or harvest the new text into another --store."
            )

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        self._position = max(0, base + offset)
        return self._position

    def readinto(self, buffer: Any) -> int:
        length = min(len(buffer), self._size - self._position)
        if length <= 0:
            return 0
        gone = InputError(f"{self._url} was removed while it was read.")
        with self._bucket.explained(f"read {self._url}", gone):
            block = self._bucket.read_range(self._bucket.path, self._position, length, self._etag)
        buffer[: len(block)] = block
        self._position += len(block)
        return len(block)
