"""A bucket on an S3 server: clients for it, and its failures as sentences.

Address and credentials come from the environment, as for other S3 tools: AWS_ENDPOINT_URL (unset
for Amazon; http:// is allowed), AWS_REGION, AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY,
AWS_SESSION_TOKEN, AWS_SKIP_SIGNATURE=true for public data, and the rest of obstore's `S3Config`.
Buckets are addressed by path unless AWS_VIRTUAL_HOSTED_STYLE_REQUEST=true.

Requests to an endpoint that cannot be reached end after about `GIVE_UP_SECONDS`. A request that
moves many bytes may take the time that they need at `SLOWEST_BYTES_A_SECOND`.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, TypeVar

from obstore.exceptions import (
    BaseError,
    PermissionDeniedError,
    PreconditionError,
    UnauthenticatedError,
)
from obstore.store import S3Store

from sae_harvest.common.errors import InputError, SaeHarvestError

if TYPE_CHECKING:
    from obstore import GetOptions, ObjectMeta

T = TypeVar("T")

CONNECT_SECONDS = 3
GIVE_UP_SECONDS = 10
SLOWEST_BYTES_A_SECOND = 1 << 20
LIST_PAGE = 1000
ENDPOINTS = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT")

_DENIED = ("AccessDenied", "InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken")


class Bucket:
    """The bucket and path of an s3:// address; its failures are raised as `error`."""

    def __init__(self, url: str, error: type[SaeHarvestError]) -> None:
        self.name, _, path = url.removeprefix("s3://").partition("/")
        self.path = path.strip("/")
        self._error = error
        self._clients: dict[int, S3Store] = {}
        segments = self.path.split("/") if self.path else []
        if (
            not url.startswith("s3://")
            or not re.fullmatch(r"[\w.-]+", self.name, re.ASCII)
            or any(part in ("", ".", "..") or not part.isprintable() for part in segments)
        ):
            raise InputError(f"{url} is not an address of objects; expected s3://bucket/prefix.")

    def url(self, path: str) -> str:
        return f"s3://{self.name}/{path}" if path else f"s3://{self.name}"

    @property
    def endpoint(self) -> str:
        return _endpoint() or "Amazon S3"

    def client(self, n_bytes: int = 0) -> S3Store:
        """Return a client whose requests may last as long as moving `n_bytes` takes."""
        seconds = seconds_for(n_bytes)
        client = self._clients.get(seconds)
        if client is None:
            client = self._clients[seconds] = _connect(self.name, seconds)
        return client

    def read_range(self, path: str, start: int, length: int, etag: str | None = None) -> memoryview:
        """Return the bytes [start, start + length) of an object, fewer if it ends before.

        If `etag` is given, the object must have it.
        """
        options: GetOptions = {"range": (start, start + length)}
        if etag is not None:
            options["if_match"] = etag
        try:
            found = self.client(length).get(path, options=options)
        except BaseError as error:
            if "status code: 416 " in str(error):  # the object ends before `start`
                return memoryview(b"")
            raise
        return memoryview(found.bytes())

    def listed(self, folder: str) -> list[ObjectMeta]:
        """Return every object below a folder, in no particular order."""

        def collect() -> list[ObjectMeta]:
            pages = self.client().list(folder or None, chunk_size=LIST_PAGE)
            return [meta for page in pages for meta in page]

        return retried(collect, GIVE_UP_SECONDS / 2)

    def first(self, folder: str) -> str | None:
        """Return the path of any one object below a folder, None if there is none."""

        def ask() -> str | None:
            pages = self.client().list(folder or None, chunk_size=1)
            return next((meta["path"] for page in pages for meta in page), None)

        return retried(ask, GIVE_UP_SECONDS / 2)

    @contextmanager
    def explained(self, action: str, missing: Exception | None = None) -> Iterator[None]:
        """Turn failures into one sentence; a missing object raises `missing`."""
        try:
            yield
        except FileNotFoundError as error:
            if missing and "NoSuchBucket" not in str(error):
                raise missing from None
            raise self._error(f"Cannot {action}: {self._no_bucket()}") from error
        except BaseError as error:
            raise self._error(f"Cannot {action}: {self._reason(error)}") from error

    def _no_bucket(self) -> str:
        return f"there is no bucket {self.name} at {self.endpoint}; make it, or check the address."

    def _reason(self, error: BaseError) -> str:
        text = str(error)
        answer = re.search(r"<Code>(.*?)</Code>", text) or re.search(r"status code: (.*?):", text)
        code = answer[1] if answer else text.splitlines()[0]
        if "NoSuchBucket" in text:
            return self._no_bucket()
        if "/latest/api/token" in text or "/latest/meta-data" in text:
            return (
                "no credentials were found; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or "
                "AWS_SKIP_SIGNATURE=true for public data."
            )
        if isinstance(error, PermissionDeniedError | UnauthenticatedError) or code in _DENIED:
            return (
                f"{self.endpoint} denies it ({code}); check AWS_ACCESS_KEY_ID, "
                f"AWS_SECRET_ACCESS_KEY and what they may do in bucket {self.name}."
            )
        if isinstance(error, PreconditionError):
            return "it was overwritten while it was read; start again when it no longer changes."
        if "HTTP error: " in text:
            return (
                f"{self.endpoint} cannot be reached or does not answer; check the network and "
                f"{ENDPOINTS[1]}, then run the same command again."
            )
        if "redirect" in text:
            return f"bucket {self.name} is in another region; set AWS_REGION to it."
        return f"{self.endpoint} answered {code}; if that does not pass, ask those who run it."


def _connect(bucket: str, seconds: int) -> S3Store:
    endpoint = _endpoint()
    if endpoint and not re.fullmatch(r"https?://[^\s/]+(/\S*)?", endpoint):
        raise InputError(
            f"{ENDPOINTS[1]} is {endpoint}; expected an address like http://127.0.0.1:9000."
        )
    return S3Store(
        bucket,
        config={"endpoint": endpoint} if endpoint else {},
        client_options={
            "allow_http": endpoint.startswith("http://"),
            "connect_timeout": timedelta(seconds=CONNECT_SECONDS),
            "timeout": timedelta(seconds=seconds),
        },
        retry_config={
            "max_retries": 1000,  # retry_timeout ends them
            "retry_timeout": timedelta(seconds=GIVE_UP_SECONDS),
            "backoff": {
                "init_backoff": timedelta(milliseconds=100),
                "max_backoff": timedelta(seconds=2),
                "base": 2,
            },
        },
        conditional_put="etag",
        disable_bulk_delete=True,  # not every server has it; we remove objects one by one
    )


def _endpoint() -> str:
    return next((found for name in ENDPOINTS if (found := os.environ.get(name))), "")


def seconds_for(n_bytes: int) -> int:
    """Return the time limit of a request of this size.

    Limits are rounded up to a few values, since each value needs its own client.
    """
    seconds = GIVE_UP_SECONDS
    while seconds * SLOWEST_BYTES_A_SECOND < n_bytes:
        seconds *= 2
    return seconds


def passes(error: BaseError) -> bool:
    """Whether a retry may help: network failure, server failure (5xx) or concurrent write (409)."""
    return re.search(r"HTTP error: |status code: (409|5\d\d) ", str(error)) is not None


def retried(operation: Callable[[], T], within: float) -> T:
    """Repeat an operation after temporary failures, for at most `within` seconds.

    obstore itself repeats requests that are safe to repeat. It does not repeat a conditional write
    that was cut off. Here that is safe: an object that already exists is read back and adopted.
    """
    start, pause = time.monotonic(), 0.1
    while True:
        try:
            return operation()
        except BaseError as error:
            if not passes(error) or time.monotonic() - start > within:
                raise
        time.sleep(pause)
        pause *= 2
