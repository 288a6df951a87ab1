"""A harvest on Ray workers in a user's own folder, without a network, and how it ends."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import NamedTuple

import pytest

from sae_harvest.store.reader import ActivationStore
from tests.commands import (
    PATIENCE,
    commits,
    dead_network,
    digest_of,
    harvesting,
    invoke,
    options,
    session_processes,
    wait_for,
)
from tests.forked import forked

pytestmark = pytest.mark.slow

NAMESAKES = ("train", "store", "harvest", "pipelines", "tests")


class Run(NamedTuple):
    """A harvest that ended, and what was left of its session right after."""

    stdout: str
    stderr: str
    code: int
    left: dict[int, str]
    folder: Path


@pytest.fixture(scope="module")
def reference(
    tmp_path_factory: pytest.TempPathFactory, model_folder: Path, corpus_file: Path
) -> str:
    """Digest of the fixture harvest, in this process, without Ray."""
    store = tmp_path_factory.mktemp("reference") / "store"
    return digest_of(invoke(*options(model_folder, corpus_file, store)))


@pytest.fixture(scope="module")
def on_a_worker(
    tmp_path_factory: pytest.TempPathFactory, model_folder: Path, corpus_file: Path
) -> Run:
    """A Ray worker in a user's folder, whose files bear our names and fail when imported.

    Without a network; every path is relative. test_end_to_end has a checkout that is read only.
    """
    folder = tmp_path_factory.mktemp("mine")
    for name in NAMESAKES:
        (folder / f"{name}.py").write_text(f"raise RuntimeError('the user’s own {name}.py')\n")
    for link, target in (("mine", model_folder), (corpus_file.name, corpus_file)):
        (folder / link).symlink_to(target)
    arguments = options(Path("mine"), Path(corpus_file.name), Path("out/store"), workers=1)
    with harvesting(*arguments, cwd=folder, env=dead_network()) as process:
        stdout, stderr = process.communicate(timeout=PATIENCE)
        left = session_processes(process.pid)
    return Run(stdout, stderr, process.returncode, left, folder)


def test_a_worker_gives_the_bytes_of_one_process(on_a_worker: Run, reference: str) -> None:
    assert on_a_worker.code == 0, on_a_worker.stderr
    assert ActivationStore.open(on_a_worker.folder / "out/store").digest == reference


def test_standard_output_holds_the_result_and_nothing_else(
    on_a_worker: Run, reference: str
) -> None:
    line = on_a_worker.stdout
    assert line.startswith("out/store: 4,096 rows of resid_post.1, 4,096 of them now, ")
    assert line.endswith(f" tokens/s. Digest {reference}.\n")
    assert line.count("\n") == 1


def test_no_process_is_left_when_the_command_ends(on_a_worker: Run) -> None:
    assert on_a_worker.left == {}


@pytest.mark.parametrize(
    ("workers", "number", "word", "code"),
    [(0, signal.SIGTERM, "Terminated.", 143), (1, signal.SIGINT, "Interrupted.", 130)],
)
def test_an_interrupted_harvest_ends_soon_says_what_is_kept_and_can_be_continued(
    tmp_path: Path,
    model_folder: Path,
    corpus_file: Path,
    workers: int,
    number: int,
    word: str,
    code: int,
) -> None:
    store = tmp_path / "store"
    long = {"tokens": 7680, "shard_rows": 64}
    arguments = options(model_folder, corpus_file, store, workers=workers, **long)
    with forked("harvest", *arguments) as process:
        assert wait_for(lambda: commits(store) >= 3)
        os.killpg(process.pid, number)  # as a terminal does, and a scheduler
        stdout, stderr = process.communicate(timeout=PATIENCE)
        assert process.returncode == code
        assert session_processes(process.pid) == {}
    assert stdout == ""
    assert "Traceback" not in stderr
    done = commits(store)
    kept = f"{done} shards committed in {store}; the same command continues."
    assert stderr.strip().splitlines()[-1] == f"{word} {kept}"
    assert 3 <= done < 120
    result = invoke(*options(model_folder, corpus_file, store, **long))
    assert f"7,680 rows of resid_post.1, {7680 - done * 64:,} of them now" in result.stdout
