"""Text that is sent while the model writes it, and that ends when nobody reads it any more."""

from __future__ import annotations

import http.client
import json
import time

import pytest

pytest.importorskip("starlette", reason="the viewer's server is an extra: .[viewer]")
pytest.importorskip("uvicorn", reason="the viewer's server is an extra: .[viewer]")

from sae_harvest.common.errors import InputError
from sae_harvest.pipelines.viewer import models
from sae_harvest.pipelines.viewer.server import open_viewer
from tests.made_tables import write_tables
from tests.viewer_cases import N, Writer, served

REQUEST = {"prompt": "a", "clamps": [], "n_tokens": 200, "temperature": 0, "seed": 0}


@pytest.fixture(scope="module")
def viewer(tmp_path_factory):
    features = write_tables(tmp_path_factory.mktemp("stream") / "features", N)
    return open_viewer(features, open_model=lambda path, device: None)


@pytest.fixture
def writer(monkeypatch):
    writer = Writer()
    monkeypatch.setattr(models, "generate", writer)
    return writer


def asking(client):
    connection = http.client.HTTPConnection("127.0.0.1", client.port, timeout=30)
    connection.request(
        "POST", "/api/steer", json.dumps(REQUEST), {"content-type": "application/json"}
    )
    return connection


def wait(condition):
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_text_is_sent_while_it_is_written(viewer, writer):
    with served(viewer) as client:
        connection = asking(client)
        writer.go.release()
        answer = connection.getresponse()
        for n in (1, 2, 3):
            writer.go.release()
            assert json.loads(answer.readline()) == {"text": " word" * n}
        writer.go.release(200)
        assert json.loads(answer.read().splitlines()[-1])["done"]
        connection.close()


def test_who_leaves_while_the_model_writes_stops_it(viewer, writer):
    with served(viewer) as client:
        connection = asking(client)
        writer.go.release()
        answer = connection.getresponse()
        answer.readline()
        busy = client.ask("/api/steer", REQUEST)
        assert busy.status == 429
        answer.close()
        connection.close()
        while not writer.ended:  # it looks whether anybody is there after each word
            writer.go.release()
            time.sleep(0.02)
        assert len(writer.ended[0]) < 5 * 200
        writer.go.release(200)
        assert client.ask("/api/steer", REQUEST).status == 200  # the model is free again


def test_who_leaves_before_the_first_word_stops_it_there(viewer, writer):
    with served(viewer) as client:
        connection = asking(client)
        assert writer.begun.wait(30)
        connection.close()
        time.sleep(0.2)  # for the server to see it
        writer.go.release(5)
        wait(lambda: writer.ended)
        assert writer.ended == [" word"]


def test_a_fault_before_the_first_word_is_a_status_and_a_later_one_the_last_line(
    viewer, monkeypatch
):
    sentence = "The model's logits are not finite."
    writer = Writer(InputError(sentence))
    monkeypatch.setattr(models, "generate", writer)
    with served(viewer) as client:
        writer.go.release()
        answer = client.ask("/api/steer", REQUEST)
        assert (answer.status, answer.json) == (400, {"error": sentence})
        writer.fault = None
        connection = asking(client)
        writer.go.release()
        answer = connection.getresponse()
        assert answer.status == 200
        answer.readline()
        writer.fault = InputError(sentence)
        writer.go.release()
        assert json.loads(answer.readline()) == {"error": sentence}
        assert answer.read() == b""
        connection.close()
