"""Running the `harvest` command as people do: the installed script, in a process of its own."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from hashlib import sha1
from itertools import chain
from pathlib import Path
from typing import Any

from click.testing import CliRunner, Result

from sae_harvest.common.cache import cache_dir
from sae_harvest.harvest.commands.cli import main

SCRIPT = Path(sys.executable).with_name("harvest")

PATIENCE = 600  # seconds until a test gives up waiting; never how long something may take


def options(model: Path, corpus: object, store: object, **more: object) -> list[str]:
    """Arguments of `harvest run` for the fixture model: resid_post.1, 4 shards of 1,024 rows."""
    given = {"model": model, "corpus": corpus, "store": store, "layer": 1, "tokens": 4096}
    given |= {"shard-rows": 1024, "workers": 0, "context-length": 32, "compute-dtype": "float32"}
    given |= {name.replace("_", "-"): value for name, value in more.items()}
    words = [[f"--{name}", str(value)] for name, value in given.items() if value is not None]
    return ["run", *chain.from_iterable(words)]


def invoke(*arguments: object) -> Result:
    """The command in this process: quick, and what it imports can be replaced."""
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def harvest(*arguments: object, **place: Any) -> subprocess.CompletedProcess[str]:
    """The installed script, to its end."""
    command = [str(SCRIPT), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, **place)


def harvesting(*arguments: object, **place: Any) -> AbstractContextManager[subprocess.Popen[str]]:
    """The installed script under way."""
    return started([str(SCRIPT), *map(str, arguments)], **place)


@contextmanager
def started(command: list[str], **place: Any) -> Iterator[subprocess.Popen[str]]:
    """A command under way, in a session (so also a process group) of its own."""
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, start_new_session=True, **pipes, **place)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def refusal(result: Result | subprocess.CompletedProcess[str], code: int = 1) -> str:
    """The sentence of a refusal, after checking that there is exactly one and nothing else."""
    found = result.exit_code if isinstance(result, Result) else result.returncode
    assert found == code, (result.stdout, result.stderr)
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    lines = result.stderr.strip().splitlines()
    assert [line for line in lines if line.startswith("Error: ")] == [lines[-1]], lines
    return lines[-1]


def digest_of(result: Result | subprocess.CompletedProcess[str]) -> str:
    """The digest that a harvest printed, after checking that it printed one line and no more."""
    line = re.fullmatch(r".* rows of .*\. Digest ([0-9a-f]{32})\.\n", result.stdout)
    assert line is not None, (result.stdout, result.stderr)
    return line[1]


def wait_for(condition: Callable[[], object], seconds: float = PATIENCE) -> bool:
    """Whether the condition came true in time."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.02)
    return True


def commits(store: Path) -> int:
    """Shards committed so far."""
    return len(list(store.glob("commits/*.json")))


def session_processes(session: int) -> dict[int, str]:
    """Process id → command of everything alive in a session, Ray's own processes included."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            fields = (folder / "stat").read_bytes().rpartition(b")")[2].split()
            if int(fields[3]) == session and fields[0] != b"Z":
                command = (folder / "cmdline").read_bytes().replace(b"\0", b" ")
                found[int(folder.name)] = command.decode(errors="replace")
        except (FileNotFoundError, ProcessLookupError):
            continue
    return found


def locked_checkout(folder: Path) -> dict[str, str]:
    """Copies the package there, read only, and returns an environment in which it is found.

    Their cache is new but for what numba has compiled of the same files, which it keeps by the path
    of their folder: compiling it all again takes a minute.
    """
    repository, cache = Path(__file__).parent.parent, folder / "cache"
    checkout = folder / "checkout"
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(repository / "sae_harvest", checkout / "sae_harvest", ignore=ignored)
    for source in [path for path in checkout.rglob("*") if path.is_dir()]:
        compiled, same = (
            place / f"{source.name}_{sha1(str(path).encode()).hexdigest()}"
            for place, path in (
                (cache_dir() / "numba", repository / source.relative_to(checkout)),
                (cache / "numba", source),
            )
        )
        if compiled.is_dir():
            shutil.copytree(compiled, same)
    for path in (checkout, *checkout.rglob("*")):
        path.chmod(path.stat().st_mode & ~0o222)
    return {
        "PYTHONPATH": str(checkout),
        "PYTHONDONTWRITEBYTECODE": "",
        "SAE_HARVEST_CACHE": str(cache),
        "NUMBA_CACHE_DIR": str(cache / "numba"),  # this process may have set it to its own
    }


def dead_network() -> dict[str, str]:
    """An environment in which every request to the outside fails at once."""
    names = ("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy")
    kept = {k: v for k, v in os.environ.items() if k != "HF_HUB_OFFLINE"}
    return kept | dict.fromkeys(names, "http://127.0.0.1:9")
