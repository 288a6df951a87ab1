"""An S3 server that fails: answers that get lost, denials, silence; each is one sentence."""

from __future__ import annotations

import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from sae_harvest.common.errors import InputError, SaeHarvestError, StoreError
from sae_harvest.store.s3 import S3Objects, list_inputs
from tests.s3_server import S3Server, use

pytest_plugins = ("tests.s3_fixtures",)
pytestmark = pytest.mark.usefixtures("as_writer")

RESET = struct.pack("ii", 1, 0)  # linger for no time at all
PATIENCE_SECONDS = 16  # what a person waits for the sentence when nothing answers


def test_a_lost_answer_loses_nothing(
    objects: S3Objects, s3: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    for fault in ("before", "after"):  # the server has read the request, or has carried it out
        with unreliable(s3.endpoint, [fault, "none", fault]) as endpoint:
            monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
            writer = S3Objects(objects.place)
            created = writer.publish(fault, [b"mine"])  # False: it met its own object
            assert created == (fault == "before")
            assert writer.read(fault) == b"mine"
            assert writer.keys(fault) == [fault]


def test_another_write_under_way_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    with answering([409, 503, 200, 412]) as (endpoint, seen):
        monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
        assert S3Objects("s3://harvest/x").publish("key", [b"x"])
    assert seen == ["*"] * 4


def test_a_server_that_overwrites_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with answering([200, 200]) as (endpoint, _):
        monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
        with pytest.raises(StoreError, match="honours conditional writes"):
            S3Objects("s3://harvest/x").publish("key", [b"x"])


def test_no_bucket_is_one_sentence(s3: S3Server) -> None:
    nowhere = S3Objects("s3://no-such-bucket/x")
    for act in every_action(nowhere):
        sentence(act, StoreError, f"there is no bucket no-such-bucket at {s3.endpoint}")
    sentence(lambda: list_inputs("s3://no-such-bucket"), InputError, "no bucket no-such-bucket")


def test_denied_is_one_sentence(
    objects: S3Objects, s3: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    objects.publish("key", [b"x"])
    use(s3.reader_environment, monkeypatch)
    reader = S3Objects(objects.place)
    assert reader.read("key") == b"x"
    writes: list[Callable[[], object]] = [
        lambda: reader.publish("other", [b"x"]),
        lambda: reader.replace("key", [b"x"]),
        lambda: reader.remove("key"),
    ]
    for act in writes:
        sentence(act, StoreError, f"{s3.endpoint} denies it (AccessDenied)")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "stranger")
    for act in every_action(S3Objects(objects.place)):
        sentence(act, StoreError, "denies it (InvalidAccessKeyId); check AWS_ACCESS_KEY_ID")


@pytest.mark.slow
def test_no_credentials_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as taken:
        nobody = f"http://127.0.0.1:{taken.getsockname()[1]}"
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("AWS_METADATA_ENDPOINT", nobody)  # where a machine of Amazon's would ask
    sentence(lambda: S3Objects("s3://harvest/x").read("key"), StoreError, "no credentials")


@pytest.mark.parametrize("endpoint", ["localhost:9000", "not an address", "http://"])
def test_an_endpoint_that_is_none_is_one_sentence(
    endpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    for act in every_action(S3Objects("s3://harvest/x")):
        sentence(act, InputError, f"AWS_ENDPOINT_URL is {endpoint}; expected")


@pytest.mark.slow
def test_a_dead_server_is_one_sentence_soon(objects: S3Objects, s3: S3Server) -> None:
    s3.kill()
    try:
        in_parallel(every_action(objects), f"{s3.endpoint} cannot be reached")
    finally:
        s3.start()


@pytest.mark.slow
def test_a_silent_server_is_one_sentence_soon(objects: S3Objects, s3: S3Server) -> None:
    with s3.frozen():
        in_parallel(every_action(objects), f"{s3.endpoint} cannot be reached or does not")


def every_action(objects: S3Objects) -> list[Callable[[], object]]:
    return [
        lambda: objects.read("key"),
        lambda: objects.read_range("key", 0, 1),
        lambda: objects.keys("folder/"),
        lambda: objects.publish("key", [b"x"]),
        lambda: objects.replace("key", [b"x"]),
        lambda: objects.remove("key"),
    ]


def sentence(act: Callable[[], object], kind: type[SaeHarvestError], part: str) -> None:
    with pytest.raises(kind) as caught:
        act()
    message = str(caught.value)
    assert part in message
    assert "\n" not in message
    assert message.endswith(".")
    assert message.count(". ") == 0


def in_parallel(actions: list[Callable[[], object]], part: str) -> None:
    """Each fails with the sentence, in time."""
    start = time.monotonic()
    with ThreadPoolExecutor(len(actions)) as threads:
        for done in [threads.submit(sentence, act, StoreError, part) for act in actions]:
            done.result()
    assert time.monotonic() - start < PATIENCE_SECONDS


@contextmanager
def unreliable(endpoint: str, faults: list[str]) -> Iterator[str]:
    """An endpoint before another; the n-th connection suffers the n-th fault, later ones none.

    before: reset when the request has arrived. after: cut when the answer has been made.
    """
    upstream = ("127.0.0.1", int(endpoint.rpartition(":")[2]))
    plan = iter(faults)

    def carry(source: socket.socket, target: socket.socket) -> None:
        try:
            while data := source.recv(1 << 16):
                target.sendall(data)
        except OSError:
            pass  # the other direction has ended

    def serve(client: socket.socket, fault: str) -> None:
        with client, socket.create_connection(upstream) as behind:
            if fault == "before":
                client.recv(1 << 16)
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
                return
            threading.Thread(target=carry, args=(client, behind), daemon=True).start()
            if fault == "after":
                behind.recv(1 << 16)
                client.shutdown(socket.SHUT_RDWR)
                return
            carry(behind, client)

    def accept() -> None:
        while True:
            try:
                client, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=serve, args=(client, next(plan, "none")), daemon=True).start()

    with closing(socket.create_server(("127.0.0.1", 0))) as listener:
        threading.Thread(target=accept, daemon=True).start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        listener.shutdown(socket.SHUT_RDWR)


@contextmanager
def answering(statuses: list[int]) -> Iterator[tuple[str, list[str | None]]]:
    """An endpoint that answers PUT with these, in turn; and the If-None-Match of each request."""
    seen: list[str | None] = []

    class Handler(BaseHTTPRequestHandler):
        def do_PUT(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            seen.append(self.headers["If-None-Match"])
            self.send_response(statuses[len(seen) - 1])
            self.send_header("ETag", '"x"')
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as stub:
        threading.Thread(target=stub.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{stub.server_port}", seen
        stub.shutdown()
