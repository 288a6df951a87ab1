"""The object protocol against a real S3 server: who wins, what is read back, how failure sounds."""

from __future__ import annotations

import gzip
import io
import json
import os
import pickle
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from sae_harvest.common.errors import InputError, SaeHarvestError, StoreError
from sae_harvest.store.s3 import (
    INPUT_BLOCK_BYTES,
    SMALL_BYTES,
    Buffer,
    S3Objects,
    list_inputs,
    open_input,
)
from tests.s3_server import S3Server, s3_server, without_aws

RESET = struct.pack("ii", 1, 0)  # linger for no time at all
PATIENCE_SECONDS = 16  # what a person waits for the sentence when nothing answers


@pytest.fixture(scope="module")
def server() -> Iterator[S3Server]:
    with s3_server() as running:
        yield running


@pytest.fixture(autouse=True)
def _as_writer(server: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    use(server.environment, monkeypatch)


@pytest.fixture
def objects(server: S3Server, request: pytest.FixtureRequest) -> S3Objects:
    return S3Objects(f"s3://{server.bucket}/{request.node.name}")


def use(environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name in set(os.environ) - set(without_aws(dict(os.environ))):
        monkeypatch.delenv(name)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)


def test_what_is_published_is_read_back(objects: S3Objects) -> None:
    pieces: list[Buffer] = [b"abc", bytearray(b"def"), memoryview(b"ghi")]
    assert objects.publish("folder/one", pieces)
    assert objects.read("folder/one") == b"abcdefghi"
    assert objects.size("folder/one") == 9
    assert objects.publish("empty", [])
    assert objects.read("empty") == b""
    large = os.urandom(SMALL_BYTES + 1)
    assert objects.publish("large", [large[:1000], large[1000:]])
    assert objects.read("large") == large
    assert objects.leftovers() == []
    assert objects.free_bytes() is None


def test_published_objects_stay_and_replaced_ones_change(objects: S3Objects) -> None:
    assert objects.publish("key", [b"first"])
    assert not objects.publish("key", [b"second"])
    assert objects.read("key") == b"first"
    objects.replace("key", [b"thi", b"rd"])
    assert objects.read("key") == b"third"
    objects.remove("key")
    objects.remove("key")
    assert objects.size("key") is None
    assert objects.publish("key", [b"fourth"])


def test_ranges_end_with_the_object(objects: S3Objects) -> None:
    objects.publish("digits", [b"0123456789"])
    objects.publish("empty", [])
    assert bytes(objects.read_range("digits", 2, 3)) == b"234"
    assert bytes(objects.read_range("digits", 8, 100)) == b"89"
    assert bytes(objects.read_range("digits", 10, 5)) == b""
    assert bytes(objects.read_range("digits", 3, 0)) == b""
    assert bytes(objects.read_range("empty", 0, 5)) == b""


def test_missing_objects_are_file_not_found(objects: S3Objects) -> None:
    reads: list[Callable[[], object]] = [
        lambda: objects.read("none"),
        lambda: objects.read_range("none", 0, 1),
        lambda: objects.read_range("none", 0, 0),
    ]
    for read in reads:
        with pytest.raises(FileNotFoundError, match=r"^none$"):
            read()
    assert objects.size("none") is None
    assert objects.keys("none/") == []


def test_keys_are_sorted_complete_and_by_prefix(objects: S3Objects) -> None:
    names = [f"commits/{number:06d}.json" for number in range(1100)]  # S3 lists 1,000 a page
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda name: objects.replace(name, [b"x"]), reversed(names)))
    objects.replace("commits-of-another", [b"x"])
    S3Objects(objects.place + "-beside").replace("commits/x", [b"x"])
    assert objects.keys("commits/") == names
    assert objects.keys("commits/00010") == names[100:110]
    assert objects.keys("commits") == ["commits-of-another", *names]
    assert objects.keys("") == ["commits-of-another", *names]


def test_of_many_threads_one_wins_each_key(objects: S3Objects) -> None:
    n_threads, n_keys = 4, 12  # the server makes those that meet wait, for a second at a time
    barrier = threading.Barrier(n_threads)

    def write(thread: int) -> list[int]:
        mine = pickle.loads(pickle.dumps(objects))  # noqa: S301
        won = []
        for key in range(n_keys):
            barrier.wait()
            if mine.publish(f"race/{key}", [bytes([thread]) * (1 + key * 4096)]):
                won.append(key)
        return won

    with ThreadPoolExecutor(n_threads) as threads:
        won = list(threads.map(write, range(n_threads)))
    assert sorted(key for keys in won for key in keys) == list(range(n_keys))
    for thread, keys in enumerate(won):
        for key in keys:
            assert objects.read(f"race/{key}") == bytes([thread]) * (1 + key * 4096)


def test_of_many_processes_one_wins_each_key(objects: S3Objects) -> None:
    script = """
import json, sys
from sae_harvest.store.s3 import S3Objects
objects = S3Objects(sys.argv[1])
print("ready", flush=True)
sys.stdin.readline()
print(json.dumps([k for k in range(50) if objects.publish(f"race/{k}", [sys.argv[2].encode()])]))
"""
    command = [sys.executable, "-c", script, objects.place]
    processes = [
        subprocess.Popen(
            [*command, str(n)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for n in range(3)
    ]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    won = [json.loads(process.communicate(timeout=30)[0]) for process in processes]
    assert sorted(key for keys in won for key in keys) == list(range(50))
    for number, keys in enumerate(won):
        assert all(objects.read(f"race/{key}") == str(number).encode() for key in keys)


def test_a_copy_knows_only_its_place(objects: S3Objects) -> None:
    objects.publish("key", [b"x"])
    packed = pickle.dumps(objects)
    assert b"secret" not in packed
    copy = pickle.loads(packed)  # noqa: S301
    assert copy.place == objects.place
    assert copy.read("key") == b"x"


@pytest.mark.parametrize("place", ["s3://", "s3:///x", "s3://b/a//b", "s3://b/../c", "s3://a b/c"])
def test_other_addresses_are_refused(place: str) -> None:
    with pytest.raises(InputError, match=r"expected s3://bucket/prefix\.$"):
        S3Objects(place)


def test_a_lost_answer_loses_nothing(
    objects: S3Objects, server: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    for fault in ("before", "after"):  # the server has read the request, or has carried it out
        with unreliable(server.endpoint, [fault, "none", fault]) as endpoint:
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


def test_no_bucket_is_one_sentence(server: S3Server) -> None:
    nowhere = S3Objects("s3://no-such-bucket/x")
    for act in every_action(nowhere):
        sentence(act, StoreError, f"there is no bucket no-such-bucket at {server.endpoint}")
    sentence(lambda: list_inputs("s3://no-such-bucket"), InputError, "no bucket no-such-bucket")


def test_denied_is_one_sentence(
    objects: S3Objects, server: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    objects.publish("key", [b"x"])
    use(server.reader_environment, monkeypatch)
    reader = S3Objects(objects.place)
    assert reader.read("key") == b"x"
    writes: list[Callable[[], object]] = [
        lambda: reader.publish("other", [b"x"]),
        lambda: reader.replace("key", [b"x"]),
        lambda: reader.remove("key"),
    ]
    for act in writes:
        sentence(act, StoreError, f"{server.endpoint} denies it (AccessDenied)")
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
def test_a_dead_server_is_one_sentence_soon(objects: S3Objects, server: S3Server) -> None:
    server.kill()
    try:
        in_parallel(every_action(objects), f"{server.endpoint} cannot be reached")
    finally:
        server.start()


@pytest.mark.slow
def test_a_silent_server_is_one_sentence_soon(objects: S3Objects, server: S3Server) -> None:
    with server.frozen():
        in_parallel(every_action(objects), f"{server.endpoint} cannot be reached or does not")


def test_what_is_published_outlives_a_crash_of_the_server(
    objects: S3Objects, server: S3Server
) -> None:
    assert objects.publish("key", [b"x" * 100_000])
    server.kill()
    server.start()
    assert objects.read("key") == b"x" * 100_000
    assert not objects.publish("key", [b"y"])


def test_inputs_are_listed_with_size_and_etag(objects: S3Objects) -> None:
    names = ["a.jsonl", "b c/p%41 #?.txt", "b c/é東.txt", "z.parquet"]
    for number, name in enumerate(names):
        objects.replace(name, [b"x" * number])
    found = list_inputs(objects.place)
    assert [(url, size) for url, size, _ in found] == [
        (f"{objects.place}/{name}", number) for number, name in enumerate(names)
    ]
    assert len({etag for *_, etag in found}) == len(names)
    assert all(etag.isalnum() for *_, etag in found)
    assert list_inputs(f"{objects.place}/") == found
    assert list_inputs(f"{objects.place}/a.jsonl") == found[:1]
    assert [open_input(url).read() for url, *_ in found] == [b"x" * n for n in range(4)]
    with pytest.raises(InputError, match="no object at or below"):
        list_inputs(f"{objects.place}/a.json")


def test_inputs_are_read_as_streams(objects: S3Objects) -> None:
    lines = [f"line {number} é\n".encode() * 1000 for number in range(1000)]
    text = b"".join(lines)
    assert len(text) > 2 * INPUT_BLOCK_BYTES
    objects.replace("text", [text])
    objects.replace("text.gz", [gzip.compress(text, 1)])
    with open_input(f"{objects.place}/text") as stream:
        assert b"".join(stream) == text
        stream.seek(-5, io.SEEK_END)
        assert stream.read() == text[-5:]
        stream.seek(3)
        assert stream.read(4) == text[3:7]
    with gzip.open(open_input(f"{objects.place}/text.gz")) as unpacked:
        assert unpacked.read() == text
    with io.TextIOWrapper(open_input(f"{objects.place}/text"), "utf-8") as characters:
        assert characters.readline() == "line 0 é\n"


def test_an_input_that_changes_or_goes_is_noticed(objects: S3Objects) -> None:
    url = f"{objects.place}/text"
    with pytest.raises(InputError, match="There is no object"):
        open_input(url)
    objects.replace("text", [b"a" * (INPUT_BLOCK_BYTES + 1)])
    ((_, _, etag),) = list_inputs(url)
    open_input(url, etag).close()
    with pytest.raises(InputError, match="has been overwritten since it was listed"):
        open_input(url, "another")
    with open_input(url) as changed, open_input(url) as removed:
        assert changed.read(1) == removed.read(1) == b"a"
        objects.replace("text", [b"b" * (INPUT_BLOCK_BYTES + 1)])
        with pytest.raises(InputError, match="it was overwritten while it was read"):
            changed.read()
        objects.remove("text")
        with pytest.raises(InputError, match="was removed while it was read"):
            removed.read()


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
