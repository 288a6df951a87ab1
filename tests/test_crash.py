"""Killed anywhere and continued, `harvest run` gives the store it would have given undisturbed."""

from __future__ import annotations

import errno
import os
import random
import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pytest

from sae_harvest.common.errors import SaeHarvestError
from sae_harvest.store.reader import ActivationStore
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
from tests.faulty_disk import CODES, FaultyDisk, faulty, sentence_of
from tests.forked import forked
from tests.synthetic import make_plan, make_store
from tests.test_faults import SHORT, assert_nothing_wrong, assert_whole

MANY = 120  # shards
MANY_SHARDS = {"tokens": MANY * 64, "shard_rows": 64}
KILLS = 2


@pytest.fixture(scope="module")
def undisturbed(
    tmp_path_factory: pytest.TempPathFactory, model_folder: Path, corpus_file: Path
) -> str:
    """Digest of the harvest of many shards, never interrupted."""
    path = tmp_path_factory.mktemp("undisturbed") / "store"
    return digest_of(invoke(*options(model_folder, corpus_file, path, **MANY_SHARDS)))


class KilledDriver(NamedTuple):
    """A harvest with a Ray worker whose driver was killed: its store, session and moment."""

    store: Path
    session: int
    moment: float


@pytest.fixture(scope="module")
def killed_driver(
    tmp_path_factory: pytest.TempPathFactory, model_folder: Path, corpus_file: Path
) -> KilledDriver:
    path = tmp_path_factory.mktemp("killed") / "store"
    with forked(
        "harvest", *options(model_folder, corpus_file, path, workers=1, **MANY_SHARDS)
    ) as driver:
        assert wait_for(lambda: commits(path) >= 3)
        assert len(ray_workers(driver.pid)) == 1
        driver.kill()
        driver.communicate()
        return KilledDriver(path, driver.pid, time.monotonic())


def ray_workers(session: int) -> list[int]:
    """Process ids of the workers that hold a model."""
    found = session_processes(session).items()
    return [number for number, command in found if command.startswith("ray::ShardActor")]


@pytest.mark.slow
def test_a_killed_driver_takes_its_workers_along(killed_driver: KilledDriver) -> None:
    def at_work() -> list[str]:
        names = ("ShardActor", "raylet/raylet", "gcs_server")
        found = session_processes(killed_driver.session).values()
        return [command for command in found if any(name in command for name in names)]

    assert wait_for(lambda: not at_work()), at_work()


@pytest.mark.slow
def test_what_a_killed_driver_had_committed_is_continued(
    killed_driver: KilledDriver, model_folder: Path, corpus_file: Path, undisturbed: str
) -> None:
    path = killed_driver.store
    assert_nothing_wrong(path)
    done = commits(path)
    assert done < MANY
    result = invoke(*options(model_folder, corpus_file, path, **MANY_SHARDS))
    assert f"{(MANY - done) * 64:,} of them now" in result.stdout
    assert digest_of(result) == undisturbed
    assert_whole(path, undisturbed)


def reached(path: Path, aim: int) -> bool:
    return commits(path) >= aim


@pytest.mark.slow
def test_a_harvest_killed_again_and_again_gives_the_same_store(
    tmp_path: Path, model_folder: Path, corpus_file: Path, undisturbed: str
) -> None:
    path = tmp_path / "store"
    arguments = options(model_folder, corpus_file, path, **MANY_SHARDS)
    rng = random.Random(0)
    for _ in range(KILLS):
        aim = commits(path) + rng.randint(1, 18)
        with forked("harvest", *arguments) as process:
            assert wait_for(partial(reached, path, aim))
            time.sleep(rng.uniform(0, 0.03))
            process.kill()
            process.communicate()
        assert_nothing_wrong(path)
        assert not (path / "seals").exists()
    done = commits(path)
    assert KILLS <= done < MANY
    result = invoke(*arguments)
    assert f"{(MANY - done) * 64:,} of them now" in result.stdout  # no committed shard again
    assert digest_of(result) == undisturbed
    assert_whole(path, undisturbed)
    assert not (path / "status.json").exists()


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


@pytest.mark.slow
def test_two_drivers_at_once_make_one_store(
    tmp_path: Path, model_folder: Path, corpus_file: Path, undisturbed: str
) -> None:
    path = tmp_path / "store"
    arguments = options(model_folder, corpus_file, path, **MANY_SHARDS)
    with forked("harvest", *arguments) as one, forked("harvest", *arguments) as two:
        ends = [
            subprocess.CompletedProcess(driver.args, driver.wait(180), *driver.communicate())
            for driver in (one, two)
        ]
    finished = [end for end in ends if end.returncode == 0]
    assert finished, [end.stderr for end in ends]
    assert {digest_of(end) for end in finished} == {undisturbed}
    for end in ends:
        if end not in finished:
            refusal(end)
    assert_whole(path, undisturbed)


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory, model_folder: Path, corpus_file: Path) -> str:
    """Digest of a harvest of two shards."""
    path = tmp_path_factory.mktemp("short") / "store"
    return digest_of(invoke(*options(model_folder, corpus_file, path, **TWO_SHARDS)))


TWO_SHARDS = {"tokens": 128, "shard_rows": 64}


@pytest.mark.slow
def test_a_failing_write_under_the_command_is_one_sentence_and_the_same_command_continues(
    tmp_path: Path, model_folder: Path, corpus_file: Path, short: str
) -> None:
    def arguments(path: Path) -> list[str]:
        return options(model_folder, corpus_file, path, **TWO_SHARDS)

    with faulty(FaultyDisk("writev", 0)) as disk:
        assert digest_of(invoke(*arguments(tmp_path / "healthy"))) == short
    assert disk.count >= 20
    refused = 0
    for nth in range(1, disk.count + 1):
        path, code = tmp_path / f"{nth}", CODES[nth % 2]
        with faulty(FaultyDisk("writev", nth, code)):
            result = invoke(*arguments(path))
        if result.exit_code:
            message = refusal(result)
            wanted = "No space left on" if code == errno.ENOSPC else "Cannot write"
            assert message.startswith(f"Error: {wanted} "), message
            refused += 1
        assert_nothing_wrong(path)
        assert digest_of(invoke(*arguments(path))) == short
        assert_whole(path, short)
    assert refused >= disk.count - 4  # the heartbeat's are survived


@pytest.mark.parametrize(
    ("function", "nth"), [("open", 3), ("link", 1), ("link", 4), ("fsync", 20), ("replace", 3)]
)
def test_another_fault_under_the_command_is_one_sentence_and_the_same_command_continues(
    tmp_path: Path, model_folder: Path, corpus_file: Path, short: str, function: str, nth: int
) -> None:
    path = tmp_path / "store"
    arguments = options(model_folder, corpus_file, path, **TWO_SHARDS)
    with faulty(FaultyDisk(function, nth, errno.ENOSPC, for_good=True)):
        message = refusal(invoke(*arguments))
    assert message.startswith("Error: No space left on the disk of ")
    assert message.endswith("free some space and run the same command again.")
    assert_nothing_wrong(path)
    assert digest_of(invoke(*arguments)) == short
    assert_whole(path, short)


class SmallDisk:
    """A real file system that is full."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def resize(self, kib: int) -> None:
        """Make it larger or smaller, with what is on it."""
        subprocess.run(["mount", "-o", f"remount,size={kib}k", self.path], check=True)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[SmallDisk]:
    path = tmp_path / "disk"
    path.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(path)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("only root may mount a small disk")
    try:
        yield SmallDisk(path)
    finally:
        subprocess.run(["umount", "-l", path], check=True)


def test_a_disk_that_is_full_is_one_sentence_wherever_it_happens(
    tmp_path: Path, small_disk: SmallDisk
) -> None:
    make_store(tmp_path / "healthy", make_plan(), SHORT)
    digest = ActivationStore.open(tmp_path / "healthy").digest
    path = small_disk.path / "store"
    sizes = range(8, 400, 8)
    refused = 0
    for kib in sizes:  # each goes on where the last one was stopped
        small_disk.resize(kib)
        try:
            make_store(path, make_plan(), SHORT)
            break
        except SaeHarvestError as error:
            refused += sentence_of(error).startswith("No space left on the disk of ")
        assert_nothing_wrong(path)
    assert refused == sizes.index(kib) >= 8
    assert_whole(path, digest)


def test_a_disk_that_is_full_stops_the_command_until_there_is_space(
    model_folder: Path, corpus_file: Path, tiny_store: Path, small_disk: SmallDisk
) -> None:
    path = small_disk.path / "store"
    arguments = options(model_folder, corpus_file, path, tokens=8192)
    assert re.search(r"needs \d+ kB more and the disk has .+ free; ", refusal(invoke(*arguments)))
    assert not path.exists()
    small_disk.resize(680)  # enough for the rows, not for blocks of 4 KiB
    message = refusal(invoke(*arguments))
    assert message.startswith("Error: No space left on the disk of ")
    assert commits(path) >= 1
    assert_nothing_wrong(path)
    small_disk.resize(4096)
    digest = ActivationStore.open(tiny_store).digest
    assert digest_of(invoke(*arguments)) == digest
    assert_whole(path, digest)


def test_a_store_with_a_damaged_commit_is_refused_by_name(
    tmp_path: Path, model_folder: Path, corpus_file: Path, tiny_store: Path
) -> None:
    path = Path(shutil.copytree(tiny_store, tmp_path / "store"))
    os.truncate(path / "commits" / "000003.json", 100)
    (path / "seals" / "000008.json").unlink()
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
