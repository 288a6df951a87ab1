"""Answers of language models are kept: nothing is asked twice, and nothing is lost by a kill."""

from __future__ import annotations

import json
import os
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sae_harvest.common.errors import RunError
from sae_harvest.pipelines.explain.client.cache import CachedClient
from sae_harvest.pipelines.explain.client.endpoint import EndpointClient
from sae_harvest.pipelines.explain.client.interface import (
    Answer,
    Failure,
    Generation,
    Message,
    OnAnswer,
    Read,
    Reading,
    Tally,
    Text,
    Usage,
    unheard,
)
from sae_harvest.pipelines.explain.client.settings import EndpointSettings
from tests.completion_server import serving

USAGE = Usage(3, 1)
REQUESTS = [Generation((Message("user", f"say {number}"),), 5) for number in range(4)]
READING = Reading("a", "b", (1,), ("0", "1", "2"))


class Counting:
    """A client that says what it is told to, and counts."""

    identity, reads = "counting", True

    def __init__(self, say: Callable[[Any], Answer]) -> None:
        self.say, self.tally = say, Tally()
        self.asked: list[Any] = []

    def generate(self, requests: Sequence[Any], on_answer: OnAnswer = unheard) -> list[Any]:
        found = {}
        for number in reversed(range(len(requests))):  # any order is allowed
            self.asked.append(requests[number])
            found[number] = self.say(requests[number])
            on_answer(number, found[number])
        return [found[number] for number in range(len(requests))]

    read = generate


def repeated(request: Generation) -> Text:
    return Text(request.messages[-1].text + " ü\ud800", USAGE)


@pytest.fixture
def place(tmp_path: Path) -> Path:
    return tmp_path / "new folder" / "answers.sqlite"


def test_an_answer_is_asked_once_and_stays_the_same(place: Path) -> None:
    inner = Counting(repeated)
    first = CachedClient(inner, place).generate(REQUESTS)
    assert first == [repeated(request) for request in REQUESTS]
    again = Counting(repeated)
    client = CachedClient(again, place)
    new = replace(REQUESTS[0], seed=9)
    assert client.generate([REQUESTS[2], new, REQUESTS[0]]) == [first[2], first[0], first[0]]
    assert again.asked == [new]
    assert client.tally.cached == 2


EXTREME = np.random.default_rng(0).dirichlet(np.ones(3), 50)
EXTREME[0] = [1e-300, 5e-324, 1.0]


@pytest.mark.parametrize("probability", [EXTREME, np.zeros((0, 3))], ids=["extreme", "no places"])
def test_a_distribution_comes_back_exactly(place: Path, probability: np.ndarray) -> None:
    CachedClient(Counting(lambda _: Read(probability, USAGE)), place).read([READING])
    (found,) = CachedClient(Counting(lambda _: Failure("asked")), place).read([READING])
    assert isinstance(found, Read)
    np.testing.assert_array_equal(found.probability, probability)
    assert (found.probability.dtype, found.probability.shape) == (np.float64, probability.shape)
    assert found.usage == USAGE


@pytest.mark.parametrize(
    "other",
    [
        replace(REQUESTS[0], seed=1),
        replace(REQUESTS[0], temperature=1.0),
        replace(REQUESTS[0], max_tokens=6),
        replace(REQUESTS[0], messages=(Message("system", "say 0"),)),
        replace(REQUESTS[0], messages=(*REQUESTS[0].messages, Message("user", ""))),
    ],
)
def test_every_field_of_a_request_counts(place: Path, other: Generation) -> None:
    inner = Counting(repeated)
    client = CachedClient(inner, place)
    client.generate(REQUESTS[:1])
    client.generate([other])
    assert inner.asked == [REQUESTS[0], other]


def test_another_identity_asks_again(place: Path) -> None:
    CachedClient(Counting(repeated), place).generate(REQUESTS)
    other = Counting(repeated)
    other.identity = "other"
    assert CachedClient(other, place).generate(REQUESTS[:1]) == [repeated(REQUESTS[0])]
    assert other.asked == REQUESTS[:1]


def test_equal_requests_of_a_call_are_asked_once_and_all_are_told(place: Path) -> None:
    inner = Counting(repeated)
    told: list[tuple[int, Answer]] = []
    client = CachedClient(inner, place)
    client.generate(REQUESTS[1:2])
    asked = [REQUESTS[0], REQUESTS[1], REQUESTS[0]]
    answers = client.generate(asked, lambda number, answer: told.append((number, answer)))
    assert answers == [repeated(request) for request in asked]
    assert sorted(told, key=lambda one: one[0]) == list(enumerate(answers))
    assert inner.asked == [REQUESTS[1], REQUESTS[0]]


def test_failures_are_not_kept(place: Path) -> None:
    assert (
        CachedClient(Counting(lambda _: Failure("no")), place).generate(REQUESTS)
        == [Failure("no")] * 4
    )
    inner = Counting(repeated)
    assert CachedClient(inner, place).generate(REQUESTS) == [repeated(r) for r in REQUESTS]
    assert len(inner.asked) == 4


def test_answers_before_an_error_are_kept(place: Path) -> None:
    def say(request: Generation) -> Text:
        if request is REQUESTS[1]:
            raise KeyboardInterrupt
        return repeated(request)

    with pytest.raises(KeyboardInterrupt):
        CachedClient(Counting(say), place).generate(REQUESTS)
    inner = Counting(repeated)
    CachedClient(inner, place).generate(REQUESTS)
    assert inner.asked == [REQUESTS[1], REQUESTS[0]]


def test_two_may_use_one_file_at_the_same_time(place: Path) -> None:
    second = CachedClient(Counting(repeated), place)
    taken: list[Text | Failure] = []

    def say(request: Generation) -> Text:
        if not taken:
            taken.extend(second.generate(REQUESTS))  # while the first has the file open
        return repeated(request)

    first = CachedClient(Counting(say), place).generate(REQUESTS)
    assert first == taken == [repeated(request) for request in REQUESTS]


def pages(place: Path) -> Iterator[tuple[str, bytes]]:
    whole = place.read_bytes()
    yield "no database", b"not a database" * 400
    yield "cut", whole[:5000]
    yield "overwritten", whole[:4096] + b"\xff" * (len(whole) - 4096)
    yield "an altered value", whole.replace(b"say 2", b"say 7")


def test_a_damaged_file_is_named_with_the_remedy(place: Path) -> None:
    requests = [Generation((Message("user", f"say {number}"),), 5) for number in range(100)]
    CachedClient(Counting(repeated), place).generate(requests)
    for name, content in pages(place):
        place.write_bytes(content)
        with pytest.raises(RunError, match=rf"^The cache of answers {place} is damaged \(.*delete"):
            CachedClient(Counting(repeated), place).generate(requests)
        assert name
    place.unlink()
    inner = Counting(repeated)
    CachedClient(inner, place).generate(requests)
    assert len(inner.asked) == 100


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "answers.sqlite").mkdir()
    with pytest.raises(RunError, match=r"^The cache of answers .*answers\.sqlite cannot be used"):
        CachedClient(Counting(repeated), tmp_path / "answers.sqlite").generate(REQUESTS)


KILLED = """
import sys
from pathlib import Path
from sae_harvest.pipelines.explain.client.cache import CachedClient
from sae_harvest.pipelines.explain.client.endpoint import EndpointClient
from sae_harvest.pipelines.explain.client.settings import EndpointSettings
from tests.test_explain_cache import many

client = EndpointClient(EndpointSettings(base_url=sys.argv[1], model="tiny", concurrency=3))
CachedClient(client, Path(sys.argv[2])).generate(
    many(), lambda number, answer: print(number, flush=True)
)
"""


def many() -> list[Generation]:
    return [Generation((Message("user", f"the cat {number}"),), 2) for number in range(30)]


def test_a_killed_process_goes_on_without_asking_again(place: Path, model_folder: Path) -> None:
    with serving(model_folder) as server:
        server.faults, server.stays = [""] * 12, "stall"
        command = [sys.executable, "-c", KILLED, server.url, str(place)]
        root = Path(__file__).parents[1]
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, text=True, cwd=root, env=dict(os.environ)
        ) as process:
            assert process.stdout is not None
            finished = {int(process.stdout.readline()) for _ in range(12)}
            for _ in range(15):  # three more hang
                server.arrived.acquire()
            process.kill()
        server.stays = ""
        before = server.asked()
        assert (len(finished), sum(before.values())) == (12, 15)
        settings = EndpointSettings(base_url=server.url, model="tiny", concurrency=3)
        client = CachedClient(EndpointClient(settings), place)
        answers = client.generate(many())
        assert all(isinstance(answer, Text) for answer in answers)
        assert client.tally.cached == 12
        asked = server.asked()
        for number, request in enumerate(many()):
            messages = [{"role": m.role, "content": m.text} for m in request.messages]
            twice = number not in finished and before[json.dumps(messages)] == 1
            assert asked[json.dumps(messages)] == 1 + twice
        assert sum(asked.values()) == 30 + 3


def test_the_file_is_one_table_in_wal_mode(place: Path) -> None:
    CachedClient(Counting(repeated), place).generate(REQUESTS)
    with sqlite3.connect(place) as file:
        assert file.execute("PRAGMA journal_mode").fetchone() == ("wal",)
        names = file.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall()
        assert names == [("answers",)]
        assert file.execute("SELECT count(*) FROM answers").fetchone() == (4,)
