"""The viewer's server over real HTTP: what it answers, and whom it refuses."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import threading

import numpy as np
import pytest
import torch

pytest.importorskip("starlette", reason="the viewer's server is an extra: .[viewer]")
pytest.importorskip("uvicorn", reason="the viewer's server is an extra: .[viewer]")

from sae_harvest.common.errors import InputError, RunError
from sae_harvest.pipelines.live import LiveModel, LiveText
from sae_harvest.pipelines.viewer.models import MAX_TEXT_CHARS, MAX_TOKENS
from sae_harvest.pipelines.viewer.run import listen, model_threads
from sae_harvest.pipelines.viewer.server import open_viewer
from tests.made_tables import write_sae, write_tables
from tests.viewer_cases import Client, N, command, served

pytest_plugins = ("tests.viewer_fixtures",)


class Slow(LiveModel):
    """A model that waits for `go`, and fires latent 1 on every word."""

    def __init__(self):
        self.go, self.entered = threading.Event(), threading.Event()

    def activations(self, text):
        self.entered.set()
        assert self.go.wait(30)
        words = text.split()
        ones = np.ones((len(words), 2), np.int32)
        values = np.tile(np.float32([2.5, 0]), (len(words), 1))
        return LiveText(list(range(len(words))), words, ones, values)


@pytest.fixture(scope="module")
def features(tmp_path_factory):
    return write_tables(tmp_path_factory.mktemp("served") / "features", N, hostile=True)


@pytest.fixture(scope="module")
def client(features):
    with served(open_viewer(features, allow_sql=True)) as client:
        yield client


# ---- answers


def test_pages_and_their_files_are_served_with_strict_headers(client):
    page = client.ask("/")
    assert page.status == 200
    assert page.headers["content-security-policy"].startswith("default-src 'self'")
    assert "unsafe" not in page.headers["content-security-policy"]
    assert page.headers["x-content-type-options"] == "nosniff"
    assert page.headers["referrer-policy"] == "no-referrer"
    named = re.findall(rb'(?:src|href)="(static/[^"]+)"', page.body)
    assert len(named) > 10
    for name in named:
        assert client.ask("/" + name.decode()).status == 200
    assert b"<script>" not in page.body
    assert not re.search(rb"https?://", page.body)
    assert client.ask("/static/../server.py").status == 404
    assert client.ask("/static/%2e%2e/server.py").status == 404


def test_the_api_answers_with_json(client):
    start = client.ask("/api/start").json
    assert (start["n_latents"], start["sql"], start["compare"]) == (N, True, None)
    latents = client.ask("/api/latents?sort=max&desc=1&max=5..&limit=3").json
    assert len(latents["rows"]) == 3
    assert latents["rows"][0]["max"] >= latents["rows"][1]["max"] >= 5
    assert client.ask("/api/latent/7").json["latent"] == 7
    assert client.ask("/api/search?q=court").json["tokens"]["exact"]
    sql = client.ask("/api/sql", {"sql": "SELECT count(*) AS n FROM latents"}).json
    assert (sql["columns"], sql["rows"]) == (["n"], [[N]])


@pytest.mark.parametrize(
    ("path", "body", "sentence"),
    [
        ("/api/latent/48", None, "There is no latent 48"),
        ("/api/latents?sort=x", None, "There is no column 'x'"),
        ("/api/latents?offset=-1", None, "'-1' is not a whole number"),
        ("/api/latents?limit=100000", None, "from 1 to 500"),
        ("/api/latents?max=a..", None, "'a' is not a number"),
        ("/api/search", None, "Type a token"),
        ("/api/latents?sae=b", None, "start it with --compare"),
        ("/api/compare", None, "--compare"),
        ("/api/latent/1/notes", {"note": 1, "tags": []}, "lacks note"),
        ("/api/latent/1/notes", {"note": "", "tags": [1]}, "Tags are text"),
        ("/api/latent/99/notes", {"note": "", "tags": []}, "There is no latent 99"),
        ("/api/live", {"text": " "}, "Type a text"),
        ("/api/live", {"text": "a" * (MAX_TEXT_CHARS + 1)}, "5,001 characters; at most 5,000"),
        ("/api/live", {}, "lacks text"),
        ("/api/sql", {"sql": "DROP VIEW latents"}, "A query must be one SELECT"),
        ("/api/live", b"{", "not JSON"),
        ("/api/live", b"[]", "not a JSON object"),
    ],
)
def test_what_cannot_be_answered_gets_one_sentence(client, path, body, sentence):
    answer = client.ask(path, body)
    assert answer.status == 400 or (answer.status == 409 and "live" in path)
    assert sentence in answer.json["error"] or "/nowhere" in answer.json["error"]


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"n_tokens": 0}, f"1 to {MAX_TOKENS} tokens"),
        ({"n_tokens": MAX_TOKENS + 1}, f"1 to {MAX_TOKENS} tokens"),
        ({"n_tokens": True}, "lacks n_tokens"),
        ({"temperature": -1}, "from 0 to 5"),
        ({"clamps": [{"latent": N, "value": 1}]}, f"There is no latent {N}"),
        ({"clamps": [{"latent": 1, "value": "x"}]}, "lacks value"),
        ({"clamps": [{"latent": i, "value": 1} for i in range(9)]}, "at most 8 latents"),
        ({"clamps": [3]}, "A clamp is an object"),
    ],
)
def test_generation_is_bounded(client, change, sentence):
    request = {"prompt": "a", "clamps": [], "n_tokens": 5, "temperature": 0, "seed": 0}
    answer = client.ask("/api/steer", request | change)
    assert answer.status == 400
    assert sentence in answer.json["error"]


def test_a_model_that_is_gone_is_said_in_a_sentence(client):
    answer = client.ask("/api/live", {"text": "hello"})
    assert answer.status == 409
    assert "/nowhere/sae" in answer.json["error"]


def test_sql_is_off_unless_asked_for(features):
    with served(open_viewer(features)) as client:
        answer = client.ask("/api/sql", {"sql": "SELECT 1"})
        assert answer.status == 400
        assert "--allow-sql" in answer.json["error"]
        assert client.ask("/api/start").json["sql"] is False


def test_live_text_and_steering_run_the_real_model(living):
    with served(open_viewer(living)) as client:
        text = "the cat sees the bridge"
        live = client.ask("/api/live", {"text": text}).json
        assert "".join(t["text"] for t in live["tokens"]) == text
        model = LiveModel.open(living)
        truth = model.activations(text)
        for at, token in enumerate(live["tokens"]):
            fired = truth.values[at] > 0
            assert {n for n, _, _ in token["latents"]} == set(truth.indices[at][fired].tolist())
            assert sorted(v for _, v, _ in token["latents"]) == pytest.approx(
                sorted(truth.values[at][fired].tolist()), rel=1e-4
            )
        request = {"prompt": text, "clamps": [], "n_tokens": 6, "temperature": 0, "seed": 0}
        *written, plain = client.ask("/api/steer", request).lines
        again = client.ask("/api/steer", request).lines[-1]
        steered = client.ask(
            "/api/steer", request | {"clamps": [{"latent": 3, "value": 500.0}]}
        ).lines[-1]
        so_far = [line["text"] for line in written]  # after each token
        assert len(so_far) == 6
        assert all(plain["text"].startswith(part) for part in so_far)
        assert so_far == sorted(so_far, key=len)
        assert plain["done"]
        assert plain == again
        assert len(plain["token_texts"]) == 6
        assert "".join(plain["token_texts"]) == plain["text"]
        assert steered["text"] != plain["text"]


def test_the_model_works_for_one_at_a_time(features):
    model = Slow()
    with served(open_viewer(features, open_model=lambda path, device: model)) as client:
        first = []
        thread = threading.Thread(
            target=lambda: first.append(client.ask("/api/live", {"text": "a b"}))
        )
        thread.start()
        assert model.entered.wait(30)
        second = client.ask("/api/live", {"text": "c"})
        pages = client.ask("/api/latent/3")  # pages do not wait for the model
        model.go.set()
        thread.join()
        assert second.status == 429
        assert "busy" in second.json["error"]
        assert pages.status == 200
        assert first[0].status == 200
        assert [t["latents"][0][:2] for t in first[0].json["tokens"]] == [[1, 2.5]] * 2
        assert client.ask("/api/live", {"text": "c"}).status == 200


def test_two_saes_are_served_side_by_side(tmp_path):
    folders = []
    for name, n, seed in (("a", 40, 0), ("b", 24, 1)):
        sae = write_sae(tmp_path / f"sae-{name}", n, seed=seed)
        folders.append(
            write_tables(
                tmp_path / name, n, seed=seed, sae=str(tmp_path / f"sae-{name}"),
                sae_digest=sae.digest,
            )
        )  # fmt: skip
    with served(open_viewer(*folders)) as client:
        assert client.ask("/api/start").json["compare"]["n_latents"] == 24
        assert client.ask("/api/start?sae=b").json["n_latents"] == 24
        rows = client.ask("/api/compare?desc=1").json["rows"]
        page = client.ask(f"/api/latent/{rows[0]['latent']}").json
        assert page["nearest"]["other"] == rows[0]["other"]
        assert client.ask("/api/latent/3?sae=b").json["nearest"] is None
        assert client.ask("/api/latent/30?sae=b").status == 400
        client.ask("/api/latent/3/notes?sae=b", {"note": "theirs", "tags": []})
        assert client.ask("/api/latent/3").json["notes"]["note"] == ""
        assert client.ask("/api/latent/3?sae=b").json["notes"]["note"] == "theirs"


# ---- refusals


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:80", "127.0.0.1.evil.example", "x@"]
)
def test_on_loopback_other_names_are_refused(client, host):
    for path in ("/", "/api/start", "/static/app.js"):
        answer = client.ask(path, host=host)
        assert answer.status == 421
        assert "this server answers to" in answer.json["error"].lower()


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1:1", "[::1]:8800", "LOCALHOST:3"])
def test_this_machine_s_names_are_answered(client, host):
    assert client.ask("/api/start", host=host).status == 200


def test_only_our_own_pages_may_change_anything(client):
    note = {"note": "x", "tags": []}
    path = "/api/latent/1/notes"
    own = f"http://127.0.0.1:{client.port}"
    assert client.ask(path, note, origin=own, sec_fetch_site="same-origin").status == 200
    assert client.ask(path, note, origin="http://evil.example").status == 403
    assert client.ask(path, note, origin="null").status == 403
    assert client.ask(path, note, origin=f"http://127.0.0.1:{client.port + 1}").status == 403
    assert client.ask(path, note, sec_fetch_site="cross-site").status == 403
    assert client.ask("/api/start", sec_fetch_site="cross-site").status == 403
    assert client.ask("/", sec_fetch_site="cross-site").status == 200  # a link from elsewhere
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data"):
        assert client.ask(path, note, content_type=kind).status == 415
    assert client.ask(path).status == 405
    for method in ("PUT", "DELETE", "OPTIONS", "PATCH"):
        assert client.ask(path, note, method=method).status == 405
    assert "access-control-allow-origin" not in client.ask("/api/start").headers


def test_large_requests_are_refused(client):
    answer = client.ask("/api/live", {"text": "a" * 70_000})
    assert answer.status == 413
    assert client.ask("/api/start").status == 200


def test_a_token_is_asked_for_once_and_kept_in_a_cookie(features):
    with served(open_viewer(features), token="right") as client:
        for path in ("/", "/api/start", "/static/app.js", "/api/start?token=wrong"):
            answer = client.ask(path, host="a.machine:1")
            assert answer.status in (401, 403)
            assert "token" in answer.json["error"]
        assert client.ask("/", cookie="viewer=wrong").status == 401
        assert client.ask("/", cookie="viewer=ri\x00ght;;=").status in (400, 401)
        moved = client.ask("/?token=right&x=1", host="a.machine:1")
        assert (moved.status, moved.headers["location"]) == (303, "/?x=1")
        cookie = moved.headers["set-cookie"]
        assert "HttpOnly" in cookie
        assert "SameSite=strict" in cookie
        kept = cookie.split(";")[0]
        assert client.ask("/api/start", cookie=kept, host="a.machine:1").status == 200


def test_the_list_s_token_filter_is_not_taken_for_the_access_token(features):
    with served(open_viewer(features), token="right") as client:
        kept = client.ask("/?token=right").headers["set-cookie"].split(";")[0]
        filtered = client.ask("/api/latents?fires_on=court&sort=max", cookie=kept)
        assert filtered.status == 200
        assert 0 < filtered.json["total"] < N - 1
        for path in ("/api/latents", "/api/start", "/static/app.js"):  # it has no meaning there
            assert client.ask(f"{path}?token=court", cookie=kept).status == 200
            assert client.ask(f"{path}?token=right").status == 401


def test_the_model_has_half_of_the_processors_or_what_the_user_says(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    for processors, threads in ((1, 1), (2, 1), (3, 1), (16, 8)):
        monkeypatch.setattr(os, "sched_getaffinity", lambda pid, n=processors: set(range(n)))
        assert model_threads() == threads
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert model_threads() == torch.get_num_threads()


# ---- the command


def test_serve_says_where_it_is_and_keeps_notes_over_a_kill(tmp_path):
    features = write_tables(tmp_path / "features", 8)
    for said in ("first", "second"):
        with command(["--features", str(features)]) as (process, port, line, _):
            assert line.startswith("8 latents at http://127.0.0.1:")
            client = Client(port)
            if said == "first":
                answer = client.ask("/api/latent/3/notes", {"note": "kept", "tags": ["a"]})
                assert answer.json == {"note": "kept", "tags": ["a"]}
                process.send_signal(signal.SIGKILL)
            else:
                assert client.ask("/api/latent/3").json["notes"] == {"note": "kept", "tags": ["a"]}
                assert client.ask("/api/notes").json["rows"][0]["latent"] == 3


def test_serve_beyond_this_machine_warns_and_asks_for_a_token(tmp_path):
    features = write_tables(tmp_path / "features", 8)
    with command(["--features", str(features), "--host", "0.0.0.0"]) as (_, port, line, errors):
        assert "Warning: 0.0.0.0 can be reached from other machines" in errors.read_text()
        token = line.split("?token=")[1].split()[0]
        assert len(token) == 32
        client = Client(port)
        assert client.ask("/api/start").status == 401
        assert client.ask(f"/?token={token}").status == 303


def test_a_port_that_is_taken_is_said_in_a_sentence():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(InputError, match=r"Cannot listen on 127\.0\.0\.1 port [0-9]+ "):
            listen("127.0.0.1", taken.getsockname()[1])
    with pytest.raises(InputError, match=r"Cannot listen on no\.such\.host"):
        listen("no.such.host.invalid", 0)


def test_a_folder_without_tables_is_said_in_a_sentence(tmp_path):
    with pytest.raises(RunError, match="no feature tables"):
        open_viewer(tmp_path)
    features = write_tables(tmp_path / "features", 8)
    shutil.rmtree(features / "firings")
    (features / "tokens.parquet").unlink()
    with pytest.raises(RunError, match=r"tokens\.parquet is missing"):
        open_viewer(features)
