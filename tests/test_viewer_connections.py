"""Connections of strangers: they are few, they have deadlines, and the owner always gets in."""

from __future__ import annotations

import http.client
import socket
import time

import pytest

pytest.importorskip("starlette", reason="the viewer's server is an extra: .[viewer]")
pytest.importorskip("uvicorn", reason="the viewer's server is an extra: .[viewer]")

from sae_harvest.pipelines.viewer.connections import CONNECTIONS, STRANGERS, Connection
from sae_harvest.pipelines.viewer.server import open_viewer
from tests.made_tables import write_tables
from tests.viewer_cases import N, served

NEVER, SOON = 600.0, 0.3
TOKEN = {"cookie": "viewer=right"}


@pytest.fixture(scope="module")
def features(tmp_path_factory):
    return write_tables(tmp_path_factory.mktemp("connections") / "features", N)


class Patient(Connection):
    header_seconds = NEVER


class Hasty(Connection):
    header_seconds = SOON


def opened(client, sent=b""):
    connection = socket.create_connection(("127.0.0.1", client.port), timeout=30)
    connection.sendall(sent)
    return connection


def ended(connection):
    """All that came until the server closed the connection."""
    received = b""
    try:
        while data := connection.recv(65536):
            received += data
    except ConnectionResetError:
        pass
    return received


@pytest.mark.parametrize(
    "sent", [b"", b"GET / HTTP/1.1\r\n", b"GET /api/start HTTP/1.1\r\nhost: x"]
)
def test_strangers_do_not_lock_the_owner_out(features, sent):
    with served(open_viewer(features), token="right", connection=Patient) as client:
        many = [opened(client, sent) for _ in range(CONNECTIONS + STRANGERS + 20)]
        for _ in range(3):
            assert client.ask("/api/start", **TOKEN).status == 200
        assert client.ask("/api/start").status == 401  # and a stranger still gets a sentence
        for connection in many[:-STRANGERS]:  # the oldest ones were closed
            assert ended(connection) == b""
        many[-1].settimeout(0.05)
        with pytest.raises(TimeoutError):
            many[-1].recv(1)
        for connection in many:
            connection.close()


def test_connections_that_were_let_in_are_not_closed_for_strangers(features):
    with served(open_viewer(features), token="right", connection=Patient) as client:
        owner = http.client.HTTPConnection("127.0.0.1", client.port, timeout=30)
        strangers = []
        for _ in range(3):
            owner.request("GET", "/api/start", headers=TOKEN)
            answer = owner.getresponse()
            assert answer.status == 200
            answer.read()
            first = owner.sock.getsockname()
            strangers += [opened(client) for _ in range(STRANGERS + 2)]
            assert owner.sock.getsockname() == first
        owner.close()
        for connection in strangers:
            connection.close()


@pytest.mark.parametrize("sent", [b"", b"GET / HTTP/1.1\r\nhost: 127.0.0.1\r\nx: "])
def test_headers_have_a_deadline_however_slowly_they_come(features, sent):
    with served(open_viewer(features), connection=Hasty) as client:
        connection = opened(client, sent)
        connection.settimeout(0.02)
        end = time.monotonic() + 20
        while time.monotonic() < end:  # a byte now and then, as slow-loris does
            try:
                if sent:
                    connection.sendall(b"a")
                if connection.recv(1) == b"":
                    break
            except TimeoutError:
                continue
            except OSError:  # reset
                break
        else:
            pytest.fail("the connection was still open after 20 s")
        assert client.ask("/api/start").status == 200


def test_a_body_has_a_deadline(features):
    with served(open_viewer(features), body_seconds=SOON) as client:
        head = (
            b"POST /api/latent/3/notes HTTP/1.1\r\nhost: 127.0.0.1\r\n"
            b"content-type: application/json\r\ncontent-length: 100\r\n\r\n"
        )
        answer = ended(opened(client, head + b'{"note": "'))
        assert answer.startswith(b"HTTP/1.1 408 ")
        assert b"did not arrive in time" in answer
        assert client.ask("/api/latent/3").json["notes"]["note"] == ""


def test_a_body_that_nobody_asked_for_has_the_deadline_of_the_next_headers(features):
    with served(open_viewer(features), token="right", connection=Hasty) as client:
        head = b"POST /api/live HTTP/1.1\r\nhost: x\r\ncontent-length: 100000\r\n\r\n{"
        assert b" 401 " in ended(opened(client, head))


def test_an_answer_may_take_longer_than_headers_may(features):
    class Slow:
        def __getattr__(self, name):
            return getattr(viewer.shown, name)

        @property
        def overview(self):
            time.sleep(3 * SOON)
            return viewer.shown.overview

    viewer = open_viewer(features)
    with served(type(viewer)(Slow()), connection=Hasty) as client:
        assert client.ask("/api/start").json["n_latents"] == N
