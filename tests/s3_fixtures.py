"""An S3 server for the tests of one file, and the environment to write to it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from sae_harvest.store.s3 import S3Objects
from tests.s3_server import S3Server, s3_server, use


@pytest.fixture(scope="module")
def s3() -> Iterator[S3Server]:
    with s3_server() as running:
        yield running


@pytest.fixture
def as_writer(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    use(s3.environment, monkeypatch)


@pytest.fixture
def objects(s3: S3Server, request: pytest.FixtureRequest) -> S3Objects:
    return S3Objects(f"s3://{s3.bucket}/{request.node.name}")
