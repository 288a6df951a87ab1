"""A model behind an endpoint: the same answers as a local one, and no fault becomes a number."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import threading
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from sae_harvest.common.errors import InputError
from sae_harvest.pipelines.explain.client.cache import CachedClient
from sae_harvest.pipelines.explain.client.endpoint import EndpointClient
from sae_harvest.pipelines.explain.client.interface import (
    Failure,
    Generation,
    Message,
    Read,
    Reading,
    Text,
)
from sae_harvest.pipelines.explain.client.local import LocalClient
from sae_harvest.pipelines.explain.client.logprobs import probabilities
from sae_harvest.pipelines.explain.client.settings import EndpointSettings
from tests.completion_server import KEY, CompletionServer, serving
from tests.test_explain_client_local import CHOICES, READINGS, conversations

ONE = Generation((Message("user", "the cat sees"),), 5)
VOCABULARY = 400


@pytest.fixture
def server(model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[CompletionServer]:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with serving(model_folder) as server:
        yield server
    assert not [thread for thread in threading.enumerate() if thread.name == "requests"]


def client_of(server: CompletionServer, **settings: Any) -> EndpointClient:
    given = {"timeout_seconds": 60, "attempts": 3, "top_logprobs": VOCABULARY, **settings}
    found = EndpointSettings(base_url=server.url, model="tiny", **given)
    return EndpointClient(found, backoff_seconds=0.001)


@pytest.mark.parametrize("concurrency", [1, 4])
def test_answers_are_those_of_a_local_model(
    server: CompletionServer, model_folder: Path, concurrency: int
) -> None:
    ours, theirs = LocalClient(str(model_folder), "cpu"), client_of(server, concurrency=concurrency)
    assert [text.text for text in theirs.generate(conversations(0)) if isinstance(text, Text)] == [
        text.text for text in ours.generate(conversations(0)) if isinstance(text, Text)
    ]
    ends = [Reading(r.prefix, r.text, (*r.slots, len(r.text)), r.choices) for r in READINGS]
    for mine, its in zip(ours.read(ends), theirs.read(ends), strict=True):
        assert isinstance(mine, Read)
        assert isinstance(its, Read)
        np.testing.assert_allclose(its.probability, mine.probability, rtol=0, atol=1e-6)
        np.testing.assert_allclose(its.probability.sum(1), 1, rtol=1e-12)
        assert its.usage.prompt_tokens == mine.usage.prompt_tokens
    assert theirs.tally.prompt_tokens == ours.tally.prompt_tokens
    assert theirs.tally.asked == 10
    assert set(server.keys) == {f"Bearer {KEY}"}


def test_the_request_says_all_that_decides_the_answer(server: CompletionServer) -> None:
    client = client_of(server)
    turns = (Message("system", "s"), Message("user", "u"))
    client.generate([Generation(turns, 7, 0.5, seed=3)])
    assert server.bodies == [
        {
            "model": "tiny",
            "messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}],
            "max_tokens": 7,
            "temperature": 0.5,
            "seed": 3,
        }
    ]


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("429", "HTTP 429"),
        ("500", "HTTP 500"),
        ("408", "HTTP 408"),
        ("malformed", "malformed JSON"),
        ("hang up", "broken connection"),
        ("stall", "timeout"),
        ("trickle", "timeout"),
    ],
)
def test_a_passing_fault_is_tried_again_and_a_lasting_one_is_a_failure(
    server: CompletionServer, monkeypatch: pytest.MonkeyPatch, fault: str, reason: str
) -> None:
    waits = skip_waits(monkeypatch)
    hangs = fault in ("stall", "trickle")
    client = client_of(server, timeout_seconds=1 if hangs else 60, attempts=2, concurrency=1)
    server.faults = [fault]
    (answer,) = client.generate([ONE])
    assert isinstance(answer, Text)
    assert (client.tally.asked, client.tally.failures) == (2, {})
    server.faults = [fault, fault]
    answers = client.read(READINGS[:2])
    assert answers[0] == Failure(reason)
    assert isinstance(answers[1], Read)
    assert (client.tally.asked, client.tally.failures) == (5, {reason: 1})
    if fault == "429":
        assert waits == [7, 7]  # Retry-After
    else:
        assert all(0.001 <= wait <= 0.0015 for wait in waits)
        assert len(waits) == 2


def skip_waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds that are waited for between attempts; no time passes."""
    waits: list[float] = []

    async def sleep(seconds: float) -> None:
        waits.append(seconds)

    monkeypatch.setattr(asyncio, "sleep", sleep)
    return waits


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("another echo", "another echo"),
        ("truncated", "no log-probabilities"),
        ("uneven", "no log-probabilities"),
        ("empty list", "no log-probabilities"),
        ("not numbers", "no log-probabilities"),
        ("no log-probabilities", "no log-probabilities"),
        ("no choices", "no log-probabilities"),
    ],
)
def test_no_faulty_log_probabilities_become_a_number(
    server: CompletionServer, fault: str, reason: str
) -> None:
    client = client_of(server, concurrency=1)
    end = Reading("", "the cat", (7,), CHOICES)
    server.faults = ["", fault]
    right, wrong, next_one = client.read([end] * 3)
    assert isinstance(right, Read)
    assert isinstance(next_one, Read)
    assert wrong == Failure(reason)
    assert client.tally.failures == {reason: 1}
    assert len(server.bodies) == 3  # it is not asked again


def test_a_choice_beyond_the_list_has_no_probability(server: CompletionServer) -> None:
    end = Reading("", "the cat", (7,), ("0", "1", "2"))
    (whole,) = client_of(server).read([end])
    assert isinstance(whole, Read)
    answer = server._completion({"prompt": "the cat", "echo": True, "logprobs": VOCABULARY})
    top = answer["choices"][0]["logprobs"]["top_logprobs"][-1]
    del top["1"]
    found = probabilities(end, answer)
    assert not isinstance(found, Failure)
    assert found[0, 1] == 0
    kept = whole.probability[0, [0, 2]]
    np.testing.assert_allclose(found[0, [0, 2]], kept / kept.sum(), rtol=1e-9)
    del top["0"], top["2"]
    assert probabilities(end, answer) == Failure("no choice among the log-probabilities")


def test_a_place_inside_a_token_is_a_failure(server: CompletionServer) -> None:
    client = client_of(server)
    assert client.read([Reading("", "the cat", (1,), CHOICES)]) == [
        Failure("no token limit at the place")
    ]


def test_a_listed_token_for_the_beginning_is_not_part_of_the_prompt(
    server: CompletionServer,
) -> None:
    """As vLLM lists it for models whose texts begin with one."""
    request = Reading("", "the cat", (3, 7), CHOICES)
    answer = server._completion({"prompt": "the cat", "echo": True, "logprobs": VOCABULARY})
    plain = probabilities(request, answer)
    logprobs = answer["choices"][0]["logprobs"]
    logprobs["tokens"].insert(0, "<s>")
    logprobs["text_offset"] = [0, *(offset + 3 for offset in logprobs["text_offset"])]
    logprobs["top_logprobs"].insert(0, None)
    found = probabilities(request, answer)
    assert not isinstance(found, Failure)
    assert found.shape == (2, len(CHOICES))
    np.testing.assert_array_equal(found, plain)


def test_an_answer_without_text_is_a_failure(server: CompletionServer) -> None:
    client = client_of(server)
    server.faults = ["no choices"]
    assert client.generate([ONE]) == [Failure("no text")]
    assert client.tally.failures == {"no text": 1}


@pytest.mark.parametrize(
    ("status", "sentence"),
    [
        ("401", r"does not accept the key \(HTTP 401\); put a valid one into .* OPENAI_API_KEY\.$"),
        ("403", r"does not accept the key \(HTTP 403\); put a valid one into .* OPENAI_API_KEY\.$"),
        ("404", r"has no http://127\.0\.0\.1:\d+/v1/completions \(HTTP 404.* use --api chat if"),
    ],
)
def test_a_refusal_stops_all_at_once(server: CompletionServer, status: str, sentence: str) -> None:
    server.stays = status
    client = client_of(server, concurrency=2)
    with pytest.raises(InputError, match=sentence) as caught:
        client.read(READINGS * 10)
    assert KEY not in str(caught.value)
    assert len(server.bodies) <= 4


def test_a_missing_or_impossible_key_is_told_by_the_name_of_its_variable(
    server: CompletionServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = client_of(server, key_variable="OTHER_KEY")
    assert isinstance(client.generate([ONE])[0], Text)
    assert server.keys == [None]
    server.stays = "401"
    with pytest.raises(InputError, match=r"asks for a key .* environment variable OTHER_KEY"):
        client.generate([ONE])
    monkeypatch.setenv("OTHER_KEY", f"{KEY}\n{KEY}")
    with pytest.raises(InputError, match="environment variable OTHER_KEY holds spaces") as caught:
        client.generate([ONE])
    assert KEY not in "".join(traceback.format_exception(caught.value))


def test_a_refused_request_keeps_the_servers_reason(server: CompletionServer) -> None:
    client = client_of(server)
    server.faults = ["400"]
    assert client.generate([ONE]) == [Failure("HTTP 400: no: *** is not right")]
    assert client.tally.failures == {"HTTP 400": 1}


def test_nobody_listening_is_a_failure(
    server: CompletionServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    skip_waits(monkeypatch)
    client = client_of(server, attempts=2)
    server.close()
    assert client.generate([ONE]) == [Failure("no connection")]
    assert (client.tally.asked, client.tally.failures) == (2, {"no connection": 1})


def test_the_key_is_in_no_answer_log_record_or_file(
    server: CompletionServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    inner = client_of(server, attempts=1, concurrency=1)
    client = CachedClient(inner, tmp_path / "answers.sqlite")
    server.faults = ["echo of the key", "400", "500", ""]
    answers = client.generate([*conversations(0)[:3], ONE])
    assert answers[0] == Text("the key is ***", answers[0].usage)  # type: ignore[union-attr]
    server.stays = "404"
    with pytest.raises(InputError) as caught:
        client.read(READINGS)
    told = "".join(traceback.format_exception(caught.value))
    files = b"".join(path.read_bytes() for path in tmp_path.iterdir())
    seen = [repr(answers), told, caplog.text, repr(inner._settings), client.identity]
    seen += [repr(vars(inner)), repr(vars(inner._sending)), repr(inner.tally)]
    assert b"the key is ***" in files
    assert KEY.encode() not in files
    assert not [text for text in seen if KEY in text]


def test_when_the_budget_is_spent_the_rest_are_failures(server: CompletionServer) -> None:
    requests = conversations(0)
    whole = client_of(server)
    texts = whole.generate(requests)
    first = texts[0]
    assert isinstance(first, Text)
    budget = first.usage.prompt_tokens + first.usage.new_tokens + 1
    client = client_of(server, budget_tokens=budget, concurrency=1)
    assert client.generate(requests) == [*texts[:2], *[Failure("budget")] * 3]
    assert client.read(READINGS[:1]) == [Failure("budget")]
    assert (client.tally.asked, client.tally.failures) == (2, {"budget": 4})


def test_requests_begin_at_the_rate_that_is_allowed(
    server: CompletionServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits = skip_waits(monkeypatch)
    client = client_of(server, requests_per_minute=0.5, concurrency=5)
    assert all(isinstance(text, Text) for text in client.generate(conversations(0)))
    assert [round(wait / 120, 1) for wait in waits] == [0, 1, 2, 3, 4]


def test_an_interrupt_gives_up_what_is_under_way(server: CompletionServer) -> None:
    server.stays = "stall"
    client = client_of(server, concurrency=3)

    def interrupt() -> None:
        for _ in range(3):
            server.arrived.acquire()
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        client.generate(conversations(0))
    thread.join()
    assert not [thread for thread in threading.enumerate() if thread.name == "requests"]
    assert len(server.bodies) == 3


def test_an_error_of_who_hears_the_answers_stops_the_others(server: CompletionServer) -> None:
    server.faults, server.stays = [""], "stall"

    def fail(number: int, answer: object) -> None:
        raise OSError("full")

    with pytest.raises(OSError, match="full"):
        client_of(server, concurrency=2).generate(conversations(0), fail)
    assert not [thread for thread in threading.enumerate() if thread.name == "requests"]


def test_answers_come_in_the_thread_of_the_caller_also_beside_a_running_loop(
    server: CompletionServer,
) -> None:
    threads: list[str] = []

    async def in_a_notebook() -> list[Text | Failure]:
        name = threading.current_thread
        return client_of(server).generate([ONE], lambda *answer: threads.append(name().name))

    assert isinstance(asyncio.run(in_a_notebook())[0], Text)
    assert threads == [threading.current_thread().name]


def test_an_endpoint_that_only_chats_does_not_read(server: CompletionServer) -> None:
    client = client_of(server, api="chat")
    assert not client.reads
    with pytest.raises(InputError, match="returns no log-probabilities with --api chat"):
        client.read(READINGS)
    assert server.bodies == []


@pytest.mark.parametrize(
    "address",
    ["localhost:8000", "ftp://host/v1", "http://", f"https://me:{KEY}@host/v1", "http://host:port"],
)
def test_an_address_without_scheme_or_with_a_password_is_refused(address: str) -> None:
    with pytest.raises(ValidationError, match="the address of an endpoint") as caught:
        EndpointSettings(base_url=address, model="m")
    assert KEY not in str(caught.value)


def test_the_identity_names_model_and_address_and_no_slash_matters(
    server: CompletionServer,
) -> None:
    settings = client_of(server)._settings
    slashed = EndpointSettings(**{**settings.model_dump(), "base_url": f"{server.url}/"})
    assert EndpointClient(slashed).identity == EndpointClient(settings).identity
    assert f"tiny at {server.url}" in EndpointClient(settings).identity
    with contextlib.suppress(ValidationError):
        settings.model = "other"  # type: ignore[misc]
    assert settings.model == "tiny"
