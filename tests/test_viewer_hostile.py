"""Requests and notes written by somebody who means harm: a value or one sentence, never a 500."""

from __future__ import annotations

import json
import sqlite3
from urllib.parse import quote

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

pytest.importorskip("starlette", reason="the viewer's server is an extra: .[viewer]")
pytest.importorskip("uvicorn", reason="the viewer's server is an extra: .[viewer]")

from sae_harvest.common.errors import RunError
from sae_harvest.pipelines.steer import Generated
from sae_harvest.pipelines.viewer import models
from sae_harvest.pipelines.viewer.notes import NOTES_FILE, Notes
from sae_harvest.pipelines.viewer.server import open_viewer
from tests.made_tables import write_tables
from tests.viewer_cases import N, served

DEEP = b"[" * 60_000
LONG = "9" * 5_000
HALF = "\ud800"
AWKWARD = (
    *("", " ", "..", "1..", "nan", "-inf", "1e999", "0x10", "1_000", "²", "٣", "½", "-1", "1.5"),
    *("latent", "max", "b", "c", "'", '"', "%00", "\x00", "\n", "\u202e", "😀", "a" * 3000, "'--"),
    *(LONG, "-" + LONG, "1" * 400, "[" * 500, "{}", "null", "../../etc/passwd", "//evil.example"),
)
TEXTS = st.sampled_from(AWKWARD) | st.text(max_size=40)
PARAMETERS = ("sae", "sort", "desc", "fires_on", "dead", "tag", "offset", "limit", "max", "density",
              "n_tokens", "q", "token", "low", "high", "class")  # fmt: skip
GETS = ("/", "/api/start", "/api/latents", "/api/search", "/api/notes", "/api/compare",
        "/api/matches", "/api/latent/{}", "/static/{}", "/{}")  # fmt: skip
POSTS = {
    "/api/latent/{}/notes": ("note", "tags"),
    "/api/live": ("text",),
    "/api/steer": ("prompt", "clamps", "n_tokens", "temperature", "seed"),
}
NUMBERS = st.integers() | st.floats() | st.sampled_from([10**400, -(10**4000), 2**63, -0.0, 1e308])
VALUES = st.recursive(
    st.none() | st.booleans() | NUMBERS | TEXTS | st.just(HALF),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.sampled_from(["latent", "value", "x"]), inner, max_size=3)
    ),
    max_leaves=8,
)


@pytest.fixture(scope="module")
def features(tmp_path_factory):
    return write_tables(tmp_path_factory.mktemp("hostile") / "features", N, hostile=True)


@pytest.fixture(scope="module")
def client(features):
    with served(open_viewer(features)) as client:
        yield client


def check(answer):
    """An answer that is no fault of the server's: refusals are one line."""
    assert answer.status < 500, answer.body
    if answer.status >= 400 and answer.headers["content-type"] == "application/json":
        sentence = answer.json["error"]
        assert "\n" not in sentence
        assert sentence.endswith(".")
        assert len(sentence) < 600
    return answer


QUICK = settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@QUICK
@given(
    path=st.sampled_from(GETS),
    part=TEXTS,
    query=st.dictionaries(st.sampled_from(PARAMETERS), TEXTS, max_size=4),
)
def test_any_address_gets_an_answer_or_one_sentence(client, path, part, query):
    address = path.replace("{}", quote(part, safe=""))
    asked = "&".join(f"{name}={quote(value)}" for name, value in query.items())
    check(client.ask(f"{address}?{asked}"))


@QUICK
@given(
    path=st.sampled_from(sorted(POSTS)),
    part=st.just("3") | TEXTS,
    data=st.data(),
)
def test_any_body_gets_an_answer_or_one_sentence(client, path, part, data):
    members = data.draw(st.dictionaries(st.sampled_from(POSTS[path]), VALUES))
    raw = data.draw(
        st.just(json.dumps(members).encode())
        | VALUES.map(lambda value: json.dumps(value).encode())
        | st.binary(max_size=30)
        | st.sampled_from([DEEP, b"{" * 9000, LONG.encode(), b'"\\ud800"', b"\xff\xfe[]", b"NaN"])
    )
    check(client.ask(path.replace("{}", quote(part, safe="")), raw))


@pytest.mark.parametrize(
    "headers",
    [
        {"origin": "http://["},
        {"origin": LONG},
        {"host": "["},
        {"host": "]" * 300},
        {"cookie": "viewer=\x7f;;=;\t"},
        {"content-type": "application/json; charset=\x7f"},
        {"sec-fetch-site": "x" * 3000},
    ],
)
def test_any_header_gets_an_answer_or_one_sentence(client, headers):
    named = {name.replace("-", "_"): value for name, value in headers.items()}
    check(client.ask("/api/latent/3/notes", {"note": "", "tags": []}, **named))
    check(client.ask("/", **named))


@pytest.mark.parametrize(
    ("path", "body", "sentence"),
    [
        ("/api/live", DEEP, "The request is not JSON (it is nested too deeply)."),
        (f"/api/latent/{LONG}", None, "There is no latent 99999999999999999999…; these"),
        ("/api/latent/-1", None, "There is no latent -1; these tables hold 0 to 47."),
        ("/api/latents?offset=" + "0" * 5000, None, "is not a whole number from 0"),
        ("/api/latents?max=nan..", None, "'nan' is not a number."),
        ("/api/latent/3/notes", {"note": HALF, "tags": []}, "The note holds half a character"),
        ("/api/latent/3/notes", {"note": "", "tags": ["a", HALF]}, "The tag holds half a char"),
        ("/api/live", {"text": f"a{HALF}"}, "The text holds half a character"),
    ],
)
def test_what_was_a_traceback_is_a_sentence(client, path, body, sentence):
    answer = check(client.ask(path, body))
    assert answer.status == 400
    assert sentence in answer.json["error"]


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"temperature": 10**400}, "The temperature is too large a number."),
        ({"n_tokens": 10**4000}, "The n_tokens is too large a number."),
        ({"seed": 2**63}, "The seed is too large a number."),
        ({"clamps": [{"latent": 10**400, "value": 1}]}, "The latent is too large a number."),
        ({"clamps": [{"latent": 1, "value": -(10**400)}]}, "The value is too large a number."),
        ({"prompt": HALF}, "The prompt holds half a character"),
    ],
)
def test_numbers_that_no_model_takes_are_sentences(features, monkeypatch, change, sentence):
    monkeypatch.setattr(models, "generate", lambda *_: Generated("x", ["x"]))
    with served(open_viewer(features, open_model=lambda path, device: None)) as client:
        request = {"prompt": "a", "clamps": [], "n_tokens": 5, "temperature": 0, "seed": 0}
        answer = check(client.ask("/api/steer", request | change))
        assert answer.status == 400
        assert sentence in answer.json["error"]
        assert client.ask("/api/steer", request).lines == [
            {"text": "x", "token_texts": ["x"], "done": True}
        ]


@pytest.mark.parametrize(
    "row", [("note", 3, b"\xff\x00"), ("note", -1, "x"), ("tag", 2**40, "x"), ("tag", 3, b"\xff")]
)
def test_a_row_of_notes_that_is_no_text_is_said_and_pages_still_show(tmp_path, row):
    features = write_tables(tmp_path / "features", 8)
    shown = open_viewer(features).shown
    shown.notes.put(5, "kept", ["kept too"])
    kind, latent, value = row
    with sqlite3.connect(features / NOTES_FILE) as connection:
        digest = connection.execute("SELECT sae FROM notes").fetchone()[0]
        connection.execute(f"INSERT INTO {kind}s VALUES (?, ?, ?)", (digest, latent, value))
    connection.close()
    with pytest.raises(RunError, match=r"notes\.sqlite holds a note or tag that is not text"):
        Notes.beside(features, digest).noted()
    with served(open_viewer(features)) as client:
        for path in ("/api/notes", "/api/latents?tag=x"):
            answer = check(client.ask(path))
            assert answer.status == 409
            assert NOTES_FILE in answer.json["error"]
        assert client.ask("/api/latent/5").json["notes"] == {"note": "kept", "tags": ["kept too"]}
        if latent == 3:
            page = check(client.ask("/api/latent/3")).json
            assert page["latent"] == 3
            assert NOTES_FILE in page["notes"]["problem"]
