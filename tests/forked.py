"""Processes that begin with everything imported, and commands in them.

Importing torch and transformers takes most of the time of a command over little data. These are
forked from a server that has imported everything and has run nothing, and are killed like others.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import entry_points
from pathlib import Path

# Forking the process of the tests, which has threads, would not be safe.
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(
    [
        "tests.preloaded",
        "tests.processes",
        "sae_harvest.harvest.run.driver",
        "sae_harvest.train.run.trainer",
        "sae_harvest.train.parallel.distributed",
        "sae_harvest.pipelines.features.building.build",
        "transformers.models.gpt2.modeling_gpt2",
    ]
)


def _main(command: list[str], environment: dict[str, str], folder: str) -> None:
    os.setsid()
    for descriptor, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{folder}/{name}", os.O_WRONLY | os.O_CREAT), descriptor)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = command
    (script,) = entry_points(group="console_scripts", name=command[0])
    script.load()()


class Forked:
    """An installed command under way, in a session of its own; to be used as `subprocess.Popen`."""

    def __init__(self, folder: str, command: list[str], environment: dict[str, str]) -> None:
        self.args = command
        self._folder = Path(folder)
        given = (command, environment, folder)
        self._process = SERVER.Process(target=_main, args=given, daemon=True)
        self._process.start()
        assert self._process.pid is not None
        self.pid: int = self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if (code := self._process.exitcode) is None:
            raise subprocess.TimeoutExpired(self.args, timeout or 0)
        return code

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """What it said on standard output and standard error, once it has ended."""
        self.wait(timeout)
        out, err = (self._folder / name for name in ("out", "err"))
        return tuple(p.read_text() if p.exists() else "" for p in (out, err))


@contextmanager
def forked(*command: object, environment: dict[str, str] | None = None) -> Iterator[Forked]:
    """A command, by the name of its script; killed if it is still there at the end."""
    words = [str(word) for word in command]
    with tempfile.TemporaryDirectory() as folder:
        process = Forked(folder, words, dict(environment or os.environ))
        try:
            yield process
        finally:
            process.kill()
            process.wait()


def ended(
    *command: object, environment: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """A command that has run to its end."""
    with forked(*command, environment=environment) as process:
        said = process.communicate(240)
        return subprocess.CompletedProcess(process.args, process.wait(), *said)
