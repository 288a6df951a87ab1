"""The object protocol against a real S3 server: who wins, and what is read back."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest

from sae_harvest.common.errors import InputError
from sae_harvest.store.s3 import SMALL_BYTES, Buffer, S3Objects
from tests.s3_server import S3Server

pytest_plugins = ("tests.s3_fixtures",)
pytestmark = pytest.mark.usefixtures("as_writer")


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


def test_what_is_published_outlives_a_crash_of_the_server(objects: S3Objects, s3: S3Server) -> None:
    assert objects.publish("key", [b"x" * 100_000])
    s3.kill()
    s3.start()
    assert objects.read("key") == b"x" * 100_000
    assert not objects.publish("key", [b"y"])
