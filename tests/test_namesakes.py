"""Where the command is run from, and what it may not need: names, network, a writable checkout.

The Ray runs here are the dear part (about ten seconds each), so each serves several tests.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from store.reader import ActivationStore
from tests.commands import (
    PATIENCE,
    commits,
    dead_network,
    digest_of,
    harvest,
    harvesting,
    invoke,
    locked_checkout,
    options,
    refusal,
    session_processes,
    wait_for,
)

pytestmark = pytest.mark.slow

NAMESAKES = ("train", "store", "harvest", "pipelines", "tests", "click", "zarr")


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
def hostile_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A user's folder whose files bear the names of packages, and fail when imported."""
    folder = tmp_path_factory.mktemp("mine")
    for name in NAMESAKES:
        (folder / f"{name}.py").write_text(f"raise RuntimeError('the user’s own {name}.py')\n")
    return folder


@pytest.fixture(scope="module")
def two_workers(hostile_folder: Path, model_folder: Path, corpus_file: Path) -> Run:
    """Two Ray workers, started in that folder, without a network; every path is relative."""
    for link, target in (("mine", model_folder), (corpus_file.name, corpus_file)):
        (hostile_folder / link).symlink_to(target)
    arguments = options(Path("mine"), Path(corpus_file.name), Path("out/store"), workers=2)
    with harvesting(*arguments, cwd=hostile_folder, env=dead_network()) as process:
        stdout, stderr = process.communicate(timeout=PATIENCE)
        left = session_processes(process.pid)
        return Run(stdout, stderr, process.returncode, left, hostile_folder)


def test_two_workers_give_the_bytes_of_one_process(two_workers: Run, reference: str) -> None:
    assert two_workers.code == 0, two_workers.stderr
    assert ActivationStore.open(two_workers.folder / "out/store").digest == reference


def test_standard_output_holds_the_result_and_nothing_else(
    two_workers: Run, reference: str
) -> None:
    line = two_workers.stdout
    assert line.startswith("out/store: 4,096 rows of resid_post.1, 4,096 of them now, ")
    assert line.endswith(f" tokens/s. Digest {reference}.\n")
    assert line.count("\n") == 1


def test_no_process_is_left_when_the_command_ends(two_workers: Run) -> None:
    assert two_workers.left == {}


@pytest.mark.parametrize("command", ["status", "verify", "show"])
def test_the_other_commands_work_beside_namesakes(two_workers: Run, command: str) -> None:
    result = harvest(command, "--store", "out/store", cwd=two_workers.folder, env=dead_network())
    assert result.returncode == 0, result.stderr
    assert "out/store" in result.stdout


def test_plan_works_beside_namesakes(
    hostile_folder: Path, model_folder: Path, corpus_file: Path
) -> None:
    arguments = ("--model", model_folder, "--corpus", corpus_file, "--layer", 1, "--tokens", 64)
    result = harvest(
        "plan", *arguments, "--context-length", 32, cwd=hostile_folder, env=dead_network()
    )
    assert result.returncode == 0, result.stderr
    assert "64 (2 contexts of 32)" in result.stdout


def test_one_worker_runs_from_a_checkout_that_cannot_be_written(
    tmp_path: Path, model_folder: Path, corpus_file: Path, reference: str
) -> None:
    environment = dead_network() | locked_checkout(tmp_path, ("harvest", "store"))
    checkout = Path(environment["PYTHONPATH"])
    before = {path: path.stat().st_mtime_ns for path in checkout.rglob("*")}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)

    program = (
        "import sys, harvest.cli, store.console\n"
        f"assert harvest.cli.__file__.startswith({str(checkout)!r}), harvest.cli.__file__\n"
        "harvest.cli.main()\n"
    )
    store = tmp_path / "store"
    command = [sys.executable, "-c", program, *options(model_folder, corpus_file, store, workers=1)]
    # Root writes through file modes: there, a read-only mount where the system allows one.
    mount = f'mount --bind "{checkout}" "{checkout}" && mount -o remount,ro,bind "{checkout}"'
    private = ["unshare", "--mount", "sh", "-c", f'{mount} && exec "$0" "$@"']
    allowed = shutil.which("unshare") and subprocess.run(
        [*private, "true"], capture_output=True, check=False
    )
    if os.geteuid() == 0 and allowed and allowed.returncode == 0:
        command = [*private, *command]
    result = subprocess.run(
        command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=PATIENCE
    )
    assert result.returncode == 0, result.stderr
    assert digest_of(result) == reference
    bytecode = {path for path in checkout.rglob("*") if "__pycache__" in path.parts}
    if command[0] == "unshare" or os.geteuid() != 0:
        assert not bytecode
    after = {path: path.stat().st_mtime_ns for path in checkout.rglob("*") if path in before}
    kept = {path for path in before if path.is_file()}
    assert {path: after[path] for path in kept} == {path: before[path] for path in kept}


def test_weights_that_a_worker_cannot_read_are_refused_in_one_sentence(
    tmp_path: Path, model_folder: Path, corpus_file: Path
) -> None:
    cut = Path(shutil.copytree(model_folder, tmp_path / "cut"))
    os.truncate(cut / "model.safetensors", 20_000)
    with harvesting(*options(cut, corpus_file, tmp_path / "store", workers=1)) as process:
        stdout, stderr = process.communicate(timeout=PATIENCE)
        assert session_processes(process.pid) == {}
    result = subprocess.CompletedProcess((), process.returncode, stdout, stderr)
    assert f"The model of {cut} can't be loaded" in refusal(result)
    assert not (tmp_path / "store").exists()


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
    with harvesting(*options(model_folder, corpus_file, store, workers=workers, **long)) as process:
        assert wait_for(lambda: commits(store) >= 3)
        os.killpg(process.pid, number)  # as a terminal does, and a scheduler
        stdout, stderr = process.communicate(timeout=15)
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
