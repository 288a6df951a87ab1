"""A served viewer to ask and to look at; shared by the viewer's tests."""

from __future__ import annotations

import http.client
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import uvicorn

from sae_harvest.pipelines.steer import Generated
from sae_harvest.pipelines.viewer.connections import Connection
from sae_harvest.pipelines.viewer.run import configuration, listen
from sae_harvest.pipelines.viewer.server import make_app

N = 48
SERVE = "import sys; from sae_harvest.pipelines.viewer.cli import serve; serve(sys.argv[1:])"


@dataclass
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self):
        return json.loads(self.body)

    @property
    def lines(self):
        """Of an answer that is written bit by bit."""
        return [json.loads(line) for line in self.body.splitlines()]


@dataclass
class Client:
    port: int
    headers: dict[str, str] = field(default_factory=dict)

    def ask(self, path, body=None, method=None, **headers):
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        sent = self.headers | {k.replace("_", "-"): v for k, v in headers.items()}
        data = None
        if body is not None:
            data = body if isinstance(body, bytes) else json.dumps(body).encode()
            sent = {"content-type": "application/json"} | sent
        connection.request(method or ("GET" if body is None else "POST"), path, data, sent)
        response = connection.getresponse()
        answer = Answer(
            response.status, {k.lower(): v for k, v in response.getheaders()}, response.read()
        )
        connection.close()
        return answer


class Writer:
    """Stands for the model: it writes a word whenever `go` lets it, until nobody wants more."""

    def __init__(self, fault=None):
        self.go, self.begun, self.ended = threading.Semaphore(0), threading.Event(), []
        self.fault = fault

    def __call__(self, live, prompt, clamps, n_tokens, temperature, seed, on_token):
        self.begun.set()
        text = ""
        for _ in range(n_tokens):
            assert self.go.acquire(timeout=30)
            if self.fault is not None:
                raise self.fault
            text += " word"
            if not on_token(text):
                break
        self.ended.append(text)
        return Generated(text, [" word"] * (len(text) // 5))


@contextmanager
def served(viewer, token=None, connection=Connection, **guard):
    """The application on a free port of this machine, in a thread."""
    listening = listen("127.0.0.1", 0)
    app = make_app(viewer, token, **guard)
    server = uvicorn.Server(configuration(app, "error", connection))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    thread.start()
    try:
        while not server.started:
            time.sleep(0.01)
        yield Client(listening.getsockname()[1])
    finally:
        server.should_exit = True
        thread.join()


@contextmanager
def command(arguments):
    """`sae-features serve` in a process of its own: process, port, first line, its stderr."""
    with tempfile.TemporaryDirectory() as folder:
        errors = Path(folder) / "stderr"
        with errors.open("w") as stderr:
            process = subprocess.Popen(
                [sys.executable, "-c", SERVE, *arguments, "--port", "0"],
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
                env=os.environ | {"PYTHONUNBUFFERED": "1"},
            )
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            assert line, errors.read_text()
            port = int(re.findall(r":(\d+)/", line)[0])
            yield process, port, line, errors
        finally:
            process.kill()
            process.wait()
            process.stdout.close()


def go(page, base, path=""):
    page.goto("about:blank")
    page.goto(f"{base}#/{path}")
    page.wait_for_selector("html[data-shown]", state="attached")
    page.wait_for_selector("main:not(.loading) .page")


def texts(page, selector):
    return page.locator(selector).all_inner_texts()
