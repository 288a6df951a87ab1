"""A real S3 server, SeaweedFS, in a process of its own on 127.0.0.1, for as long as a test needs.

with s3_server() as server:
    os.environ |= server.environment
    ...f"s3://{server.bucket}/anything"
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from pathlib import Path

import pytest
from obstore.exceptions import BaseError
from obstore.store import S3Store

START_SECONDS = 30
WEED = Path(sysconfig.get_path("scripts")) / "weed"
PARTS = ("master", "volume", "filer", "s3", "admin")
IDENTITIES = {  # who may do what; the secret of each is its name and "-secret"
    "writer": ["Admin", "Read", "Write", "List"],
    "reader": ["Read", "List"],
}


class S3Server:
    """The server's address and life. Its data outlives `kill`, as a disk outlives a crash.

    bucket: made and empty.
    environment: for clients that may read and write.
    reader_environment: for clients that may only read.
    """

    bucket = "harvest"

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        identities = [
            {"name": name, "credentials": [_credentials(name)], "actions": actions}
            for name, actions in IDENTITIES.items()
        ]
        (folder / "identities.json").write_text(json.dumps({"identities": identities}))
        self._ports = _free_ports(2 * len(PARTS))
        self.endpoint = f"http://127.0.0.1:{self._ports[2 * PARTS.index('s3')]}"
        self.environment = self._environment("writer")
        self.reader_environment = self._environment("reader")
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start, or start again after `kill` with the data there was; returns when it answers."""
        options = [
            "-ip=127.0.0.1",
            "-ip.bind=127.0.0.1",
            f"-dir={self._folder}",
            f"-bucket={self.bucket}",
            f"-s3.config={self._folder / 'identities.json'}",
            f"-s3.localSocket={self._folder / 's3.sock'}",
            f"-filer.localSocket={self._folder / 'filer.sock'}",
            "-s3.autoCreateBucket=false",
            "-s3.port.iceberg=0",
            "-s3.port.lance=0",
            "-webdav=false",
            "-admin.ui=false",
            "-master.telemetry=false",
        ]
        for number, part in enumerate(PARTS):
            port, grpc_port = self._ports[2 * number : 2 * number + 2]
            options += [f"-{part}.port={port}", f"-{part}.port.grpc={grpc_port}"]
        with (self._folder / "log.txt").open("ab") as log:
            self._process = subprocess.Popen(
                [WEED, "mini", *options], cwd=self._folder, stdout=log, stderr=log
            )
        self._wait()

    def kill(self) -> None:
        """End it at once, as a crash does. Nothing happens if it is not running."""
        if self._process is not None:
            self._process.kill()  # a stopped process ends as well
            self._process.wait()
            self._process = None
        for port in self._ports[1::2]:  # the server leaves these behind even when asked to stop
            for path in Path("/tmp").glob(f"seaweedfs-*-grpc-{port}.sock"):
                path.unlink()

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """While this lasts, connections are taken and nothing is answered."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)
        try:
            yield
        finally:
            self._process.send_signal(signal.SIGCONT)

    def _environment(self, name: str) -> dict[str, str]:
        keys = _credentials(name)
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_REGION": "us-east-1",
            "AWS_ACCESS_KEY_ID": keys["accessKey"],
            "AWS_SECRET_ACCESS_KEY": keys["secretKey"],
        }

    def _wait(self) -> None:
        """Until it can write: the bucket is made some time after the first answer."""
        keys = _credentials("writer")
        client = S3Store(
            self.bucket,
            config={
                "endpoint": self.endpoint,
                "region": "us-east-1",
                "access_key_id": keys["accessKey"],
                "secret_access_key": keys["secretKey"],
            },
            client_options={"allow_http": True, "timeout": timedelta(seconds=5)},
            retry_config={"max_retries": 0},
        )
        assert self._process is not None
        deadline = time.monotonic() + START_SECONDS
        while True:
            try:
                client.put("ready", b"yes")
                client.delete("ready")
                return
            except (BaseError, FileNotFoundError) as error:
                if self._process.poll() is not None or time.monotonic() > deadline:
                    log = (self._folder / "log.txt").read_text(errors="replace")
                    raise RuntimeError(f"no S3 server: {error}\n{log[-4000:]}") from error
            time.sleep(0.05)


@contextmanager
def s3_server(kind: type[S3Server] = S3Server) -> Iterator[S3Server]:
    """A running server with an empty bucket; when this ends, neither process nor data remain."""
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="s3-server-"))
        server = kind(Path(folder))
        stack.callback(server.kill)
        server.start()
        yield server


def without_aws(environment: dict[str, str]) -> dict[str, str]:
    """An environment less what the person running the tests has set for S3."""
    return {name: value for name, value in environment.items() if not name.startswith("AWS_")}


def _credentials(name: str) -> dict[str, str]:
    return {"accessKey": name, "secretKey": f"{name}-secret"}


def _free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        held = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [taken.getsockname()[1] for taken in held]


def use(environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """This process is a client with this environment, and no other of AWS."""
    for name in set(os.environ) - set(without_aws(dict(os.environ))):
        monkeypatch.delenv(name)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
