"""Killed anywhere and continued, a harvest gives the store it would have given undisturbed."""

from __future__ import annotations

import errno
import os
import random
import shutil
import signal
import subprocess
import time
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import store.objects
from store.errors import StoreError
from store.reader import ActivationStore
from store.verify import verify
from tests.commands import (
    commits,
    digest_of,
    harvesting,
    invoke,
    options,
    refusal,
    session_processes,
    wait_for,
)
from tests.synthetic import make_plan, make_shard, make_store

MANY_SHARDS = {"tokens": 14_016, "shard_rows": 64}  # 219 shards
KILLS = 10


@pytest.fixture(scope="module")
def undisturbed(
    tmp_path_factory: pytest.TempPathFactory, model_folder: Path, corpus_file: Path
) -> str:
    """Digest of the same harvest, never interrupted."""
    path = tmp_path_factory.mktemp("undisturbed") / "store"
    return digest_of(invoke(*options(model_folder, corpus_file, path, **MANY_SHARDS)))


def assert_whole(path: Path, digest: str) -> None:
    """The store is sealed with this digest, every byte as committed, nothing left lying about."""
    report = verify(path, lambda done, total: None)
    assert (report.digest, report.damage, report.leftovers) == (digest, [], [])
    assert ActivationStore.open(path).digest == digest


class KilledDriver(NamedTuple):
    """A harvest with two Ray workers whose driver was killed: its store, session and moment."""

    store: Path
    session: int
    moment: float


@pytest.fixture(scope="module")
def killed_driver(
    tmp_path_factory: pytest.TempPathFactory, model_folder: Path, corpus_file: Path
) -> KilledDriver:
    path = tmp_path_factory.mktemp("killed") / "store"
    with harvesting(*options(model_folder, corpus_file, path, workers=2, **MANY_SHARDS)) as driver:
        assert wait_for(lambda: commits(path) >= 3, 120)
        assert len(ray_workers(driver.pid)) == 2
        driver.kill()
        driver.communicate()
        return KilledDriver(path, driver.pid, time.monotonic())


def ray_workers(session: int) -> list[int]:
    """Process ids of the workers that hold a model."""
    found = session_processes(session).items()
    return [number for number, command in found if command.startswith("ray::ShardWorker")]


@pytest.mark.slow
def test_a_killed_driver_takes_its_workers_along(killed_driver: KilledDriver) -> None:
    def at_work() -> list[str]:
        names = ("ShardWorker", "raylet/raylet", "gcs_server")
        found = session_processes(killed_driver.session).values()
        return [command for command in found if any(name in command for name in names)]

    assert wait_for(lambda: not at_work(), 15), at_work()


@pytest.mark.slow
def test_a_killed_worker_is_replaced_while_the_driver_goes_on(
    killed_driver: KilledDriver, model_folder: Path, corpus_file: Path, undisturbed: str
) -> None:
    path = killed_driver.store
    done = commits(path)
    assert done < 219
    arguments = options(model_folder, corpus_file, path, workers=2, **MANY_SHARDS)
    with harvesting(*arguments) as process:
        assert wait_for(lambda: commits(path) >= done + 3, 120)
        os.kill(ray_workers(process.pid)[0], signal.SIGKILL)
        stdout, stderr = process.communicate(timeout=120)
        assert process.returncode == 0, stderr
        assert session_processes(process.pid) == {}
    assert f"{14_016 - done * 64:,} of them now" in stdout
    assert_whole(path, undisturbed)


def reached(path: Path, aim: int) -> bool:
    return commits(path) >= aim


@pytest.mark.slow
def test_a_harvest_killed_ten_times_gives_the_same_store(
    tmp_path: Path, model_folder: Path, corpus_file: Path, undisturbed: str
) -> None:
    path = tmp_path / "store"
    arguments = options(model_folder, corpus_file, path, **MANY_SHARDS)
    rng = random.Random(0)
    for _ in range(KILLS):
        aim = commits(path) + rng.randint(1, 18)
        with harvesting(*arguments) as process:
            assert wait_for(partial(reached, path, aim), 60)
            time.sleep(rng.uniform(0, 0.03))
            process.kill()
            process.communicate()
        assert not (path / "sealed.json").exists()
    done = commits(path)
    assert KILLS <= done < 219
    result = invoke(*arguments)
    assert f"{14_016 - done * 64:,} of them now" in result.stdout  # no committed shard again
    assert digest_of(result) == undisturbed
    assert_whole(path, undisturbed)


@pytest.mark.slow
def test_a_harvest_killed_at_any_time_after_its_start_gives_the_same_store(
    tmp_path: Path, model_folder: Path, corpus_file: Path, undisturbed: str
) -> None:
    path = tmp_path / "store"
    arguments = options(model_folder, corpus_file, path, **MANY_SHARDS)
    for seconds in (1.0, 4.0):  # while importing; about when the store is created
        with harvesting(*arguments) as process, pytest.raises(subprocess.TimeoutExpired):
            process.wait(seconds)
    assert digest_of(invoke(*arguments)) == undisturbed
    assert_whole(path, undisturbed)


class FaultyDisk:
    """Stands in for `os`: the n-th call of one function fails, `write` after half of its bytes."""

    def __init__(self, function: str, nth: int, code: int) -> None:
        self.function, self.nth, self.code = function, nth, code
        self.calls = 0

    def __getattr__(self, name: str) -> Any:
        return self.fail if name == self.function else getattr(os, name)

    def fail(self, *arguments: Any) -> Any:
        self.calls += 1
        if self.calls != self.nth:
            return getattr(os, self.function)(*arguments)
        if self.function == "write":
            descriptor, data = arguments
            os.write(descriptor, data[: len(data) // 2])
        raise OSError(self.code, os.strerror(self.code))


SMALL = make_plan(n_contexts=20)  # 3 shards, the last one short


@pytest.mark.parametrize("function", ["write", "fsync", "link"])
def test_a_fault_at_any_call_is_one_sentence_and_continuing_gives_the_same_store(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: str
) -> None:
    healthy = FaultyDisk(function, 0, 0)
    monkeypatch.setattr(store.objects, "os", healthy)
    make_store(tmp_path / "healthy", SMALL)
    digest = ActivationStore.open(tmp_path / "healthy").digest
    assert healthy.calls >= 20

    for nth in range(1, healthy.calls + 1):
        path = tmp_path / f"{nth}"
        code, sentence = (errno.EIO, "Cannot write ") if nth % 2 else (errno.ENOSPC, "No space ")
        monkeypatch.setattr(store.objects, "os", FaultyDisk(function, nth, code))
        with pytest.raises(StoreError, match=f"^{sentence}.*[.]$"):
            make_store(path, SMALL)
        monkeypatch.setattr(store.objects, "os", os)
        if path.exists() and (path / "plan.json").exists():
            report = verify(path, lambda done, total: None)
            assert [line for line in report.damage if "zarr.json" not in line] == []
        make_store(path, SMALL)
        assert_whole(path, digest)


@pytest.mark.parametrize(
    ("function", "nth"), [("write", 1), ("link", 4), ("fsync", 30), ("write", 50), ("link", 56)]
)
def test_a_fault_under_the_command_is_one_sentence_and_the_same_command_continues(
    tmp_path: Path,
    model_folder: Path,
    corpus_file: Path,
    tiny_store: Path,
    monkeypatch: pytest.MonkeyPatch,
    function: str,
    nth: int,
) -> None:
    path = tmp_path / "store"
    arguments = options(model_folder, corpus_file, path, tokens=8192)
    monkeypatch.setattr(store.objects, "os", FaultyDisk(function, nth, errno.ENOSPC))
    message = refusal(invoke(*arguments))
    assert message.startswith("Error: No space left on the disk of ")
    assert message.endswith("free some space and run the same command again.")
    monkeypatch.undo()
    digest = ActivationStore.open(tiny_store).digest
    assert digest_of(invoke(*arguments)) == digest
    assert_whole(path, digest)


@pytest.mark.parametrize(
    "key",
    [
        "tokens/c/1/0",
        "activations/resid_post.0/c/1/0",
        "norms/resid_post.0/c/1",
        "contexts/000001.parquet",
        "documents/000001.parquet",
    ],
)
@pytest.mark.parametrize("length", [0, 11])
def test_an_object_cut_by_a_power_failure_before_its_commit_is_never_adopted(
    tmp_path: Path, key: str, length: int
) -> None:
    path = tmp_path / "store"
    make_store(path, SMALL)
    digest = ActivationStore.open(path).digest
    for commit in ("commits/000001.json", "sealed.json"):
        (path / commit).unlink()
    os.truncate(path / key, length)
    make_store(path, SMALL)
    assert_whole(path, digest)


def test_an_object_of_an_attempt_that_was_killed_is_adopted_as_it_is(tmp_path: Path) -> None:
    from store.writer import commit_shard, create_store, seal, write_shard

    path = tmp_path / "store"
    create_store(path, SMALL, {})
    for number in range(3):
        write_shard(path, SMALL, make_shard(SMALL, number))
    before = {p: p.stat().st_mtime_ns for p in path.rglob("c/*") if p.is_file()}
    for number in range(3):
        commit_shard(path, write_shard(path, SMALL, make_shard(SMALL, number)))
    digest = seal(path, SMALL)
    assert {p: p.stat().st_mtime_ns for p in before} == before
    assert_whole(path, digest)


def test_a_store_with_a_damaged_commit_is_refused_by_name(
    tmp_path: Path, model_folder: Path, corpus_file: Path, tiny_store: Path
) -> None:
    path = Path(shutil.copytree(tiny_store, tmp_path / "store"))
    os.truncate(path / "commits" / "000003.json", 100)
    (path / "sealed.json").unlink()
    arguments = options(model_folder, corpus_file, path, tokens=8192)
    assert f"{path}/commits/000003.json is damaged" in refusal(invoke(*arguments))
    (path / "commits" / "000003.json").unlink()
    assert digest_of(invoke(*arguments)) == ActivationStore.open(tiny_store).digest


@pytest.mark.slow
def test_nothing_of_a_killed_drivers_ray_stays_for_good(killed_driver: KilledDriver) -> None:
    # Last in this file: two of Ray's own agents, which hold no model, wait 60 s for an answer
    # from the dead driver's control service before they end.
    left = killed_driver.moment + 75 - time.monotonic()
    session = killed_driver.session
    assert wait_for(lambda: not session_processes(session), left), session_processes(session)
