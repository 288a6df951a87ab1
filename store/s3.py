"""Objects in an S3 bucket: those of a store, and corpora to read.

`store.bucket` describes the configuration of server and credentials, and their failures.
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
    """Objects of a bucket under a prefix; `store.objects.Objects` documents each method.

    Only the place is pickled: a copy in another process uses the environment of that process.
    """

    def __init__(self, place: str) -> None:
        self._bucket = Bucket(place, StoreError)
        self._prefix = f"{self._bucket.path}/" if self._bucket.path else ""
        self.place = self._bucket.url(self._bucket.path)
        self._refuses = False  # the server is known to refuse a second object of the same key

    def __reduce__(self) -> tuple[type[S3Objects], tuple[str]]:
        return S3Objects, (self.place,)

    def publish(self, key: str, pieces: Sequence[Buffer]) -> bool:
        """Create an object by a PUT with `If-None-Match: *`, durable once the server has answered.

        False may also mean that this call itself wrote the object: a request whose answer was lost
        is sent again and finds the object. Callers read the object and adopt it in both cases. A
        server that ignores the condition would lose the object of one of two writers. The first
        small object is written twice to detect such a server, which is refused.
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
        # obstore allocates the result itself
        if length > 0:
            with self._reading(key):
                return self._bucket.read_range(self._path(key), start, length)
        if self.size(key) is None:
            raise FileNotFoundError(key)
        return b""  # S3 has no empty range

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
        """Do nothing: a bucket has no folders."""

    def leftovers(self) -> list[str]:
        return []  # an object appears whole when its PUT ends, or never

    def free_bytes(self) -> int | None:
        return None

    def _path(self, key: str) -> str:
        """Return the object's key in the bucket.

        Raise `StoreError` if it leads out of the place.
        """
        try:
            return self._prefix + safe_name(key)
        except ValueError as error:
            raise StoreError(f"{self.place} holds no such object: {error}.") from None

    def _reading(self, key: str) -> AbstractContextManager[None]:
        return self._bucket.explained(f"read {key} of {self.place}", FileNotFoundError(key))

    def _put(self, key: str, pieces: Sequence[Buffer], mode: PutMode) -> bool:
        """Write an object. Return False if the key exists, perhaps by this call: see `publish`."""
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
    """Return (url, bytes, etag) of the object at `url`, or else of all objects below it, sorted.

    Raises:
        InputError: there is none, or the bucket cannot be listed.
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

    It is read block by block, one request each, so a slow consumer is no problem. An object that is
    overwritten meanwhile is an error. Raises `InputError`, here and while reading.

    Args:
        etag: etag from the listing; an object with another etag is an error.
    """
    return io.BufferedReader(_Input(url, etag), INPUT_BLOCK_BYTES)


class _Input(io.RawIOBase):
    """One object, read in ranges of the same version."""

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
