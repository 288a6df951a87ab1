"""Killed anywhere and continued, a feature build gives the tables of an undisturbed one."""

from __future__ import annotations

import os
import random
import shutil
import signal
import struct
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest

from sae_harvest.common.errors import RunError, SaeHarvestError
from sae_harvest.pipelines.features.building import build as build_module
from sae_harvest.pipelines.features.building.build import build
from sae_harvest.pipelines.features.building.config import FeatureConfig
from sae_harvest.pipelines.features.tables.folder import BUILDING_FILE
from sae_harvest.pipelines.features.tables.writers import TableWriter
from tests.commands import wait_for
from tests.feature_cases import (
    BUILD_CONFIG,
    ENTRIES,
    assert_same_files,
    build_refusal,
    encode_blocks,
    made_case,
    refusal,
    save_sae,
    sentence,
)
from tests.forked import SERVER, Forked, ended, forked

KILLS = 3  # at random; every step is killed in turn above
BLOCKS = 8
ROUNDS = 3
Folders = tuple[Path, Path, Path]


class Interrupted(BaseException):
    """As KeyboardInterrupt, which pytest takes for itself."""


def stop_at(what: str, done: int = 0) -> Callable[[str, int, int], None]:
    """A progress report that interrupts the build there."""

    def on_progress(now: str, count: int, total: int) -> None:
        if now == what and count >= done:
            raise Interrupted

    return on_progress


def interrupted(folders: Folders, out: Path, what: str, done: int = 0) -> None:
    with pytest.raises(Interrupted):
        build(*folders[:2], out, BUILD_CONFIG, on_progress=stop_at(what, done))


def block_times(out: Path) -> dict[str, int]:
    """When each block's file was written, in ns."""
    return {path.name: path.stat().st_mtime_ns for path in out.glob("firings/[!.]*.parquet")}


def die() -> NoReturn:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("still alive")


def build_and_die(store: Path, sae: Path, out: Path, where: str) -> None:
    """Builds in a process of its own, which kills itself there."""
    what, _, number = where.partition(" ")

    def on_progress(now: str, count: int, total: int) -> None:
        if now == what and count >= int(number):
            die()

    if what == "writing":  # after a part of a table, before it has its name
        add = TableWriter.add

        def add_and_die(writer: TableWriter, part: Any) -> None:
            add(writer, part)
            if number in str(writer._path):
                die()

        TableWriter.add = add_and_die  # type: ignore[method-assign, assignment]
    if what == "named":  # all is there, but for what is tidied up last
        write = build_module.write_json

        def write_and_die(path: Path, value: Any) -> None:
            write(path, value)
            if path.name == number:
                die()

        build_module.write_json = write_and_die
    build(store, sae, out, BUILD_CONFIG, on_progress=on_progress)


def killed_at(folders: Folders, out: Path, where: str) -> None:
    process = SERVER.Process(target=build_and_die, args=(*folders[:2], out, where))
    process.start()
    process.join(180)
    assert process.exitcode == -signal.SIGKILL, where


PLACES = [
    "named building.json", "encoding 0", "encoding 3", "encoding 8", "writing latents",
    "counting 1", "writing tokens", "comparing 1", "writing contexts", "showing 1",
    "writing documents", "named run.json",
]  # fmt: skip


@pytest.mark.slow
def test_killed_at_every_step_and_continued(folders: Folders, tmp_path: Path) -> None:
    out, times = tmp_path / "features", dict[str, int]()
    for where in PLACES:
        killed_at(folders, out, where)
        assert times.items() <= block_times(out).items()  # what was encoded stays
        times = block_times(out)
        assert (out / "run.json").exists() == (where == "named run.json")
        if where != "named run.json":
            assert "no feature tables" in refusal("show", 0, "--features", out)
    assert len(times) == BLOCKS
    build(*folders[:2], out, BUILD_CONFIG)
    assert_same_files(out, folders[2])
    assert block_times(out) == times


@pytest.mark.slow
@pytest.mark.parametrize("where", ["writing latents", "writing contexts", "encoding 2"])
def test_killed_once_and_continued(folders: Folders, tmp_path: Path, where: str) -> None:
    killed_at(folders, tmp_path / "features", where)
    build(*folders[:2], tmp_path / "features", BUILD_CONFIG)
    assert_same_files(tmp_path / "features", folders[2])


@pytest.mark.slow
def test_the_command_killed_at_random_moments_and_continued(
    folders: Folders, tmp_path: Path
) -> None:
    whole = tmp_path / "whole"

    def start(out: Path) -> AbstractContextManager[Forked]:
        given = ("build", "--store", folders[0], "--sae", folders[1], "--out", out, "--window", 9)
        return forked("sae-features", *given)

    with start(whole) as undisturbed:
        assert wait_for((whole / BUILDING_FILE).exists)
        began = time.monotonic()
        assert wait_for((whole / "run.json").exists)
        seconds = time.monotonic() - began
        assert undisturbed.communicate()[1].count("Traceback") == undisturbed.returncode == 0

    rng = random.Random(0)
    kills, number, ends = 0, 0, []
    out, times = tmp_path / "0", dict[str, int]()
    for _ in range(10 * KILLS):
        if kills == KILLS:
            break
        before = stamp(out)
        with start(out) as process:
            assert begun(process, out, before)
            time.sleep(rng.uniform(0, seconds))
            process.kill()
            told = process.communicate()[1]
        assert times.items() <= block_times(out).items()  # no block was encoded again
        times = block_times(out)
        ends.append(process.returncode)
        if process.returncode == -signal.SIGKILL:
            kills += 1
        else:
            assert process.returncode == 0, told
            assert_same_files(out, whole)
            number += 1
            out, times = tmp_path / str(number), {}
    assert kills == KILLS, ends
    with start(out) as last:
        assert last.wait(120) == 0
    assert_same_files(out, whole)
    assert times.items() <= block_times(out).items()


def begun(process: Forked, out: Path, before: int | None) -> bool:
    """Waits until a build has begun, or has ended as there was nothing to do."""
    return wait_for(lambda: stamp(out) != before or process.poll() is not None)


def stamp(out: Path) -> int | None:
    """Of the file that a build writes anew when it begins."""
    try:
        return (out / BUILDING_FILE).stat().st_mtime_ns
    except FileNotFoundError:
        return None


@pytest.mark.parametrize(
    ("what", "done"),
    [("encoding", 0), ("encoding", 3), ("counting", 0), ("comparing", 0), ("showing", 0)],
)
def test_an_interrupted_build_keeps_its_blocks_and_continues(
    folders: Folders, tmp_path: Path, what: str, done: int
) -> None:
    out = tmp_path / "features"
    interrupted(folders, out, what, done)
    times = block_times(out)
    if what == "encoding" and done:  # the thread that encodes may have made more meanwhile
        assert done <= len(times) < BLOCKS
    else:
        assert len(times) == (done if what == "encoding" else BLOCKS)
    assert not (out / "run.json").exists()
    assert "no feature tables" in refusal("query", "SELECT 1", "--features", out)
    seen: list[tuple[str, int, int]] = []
    build(*folders[:2], out, BUILD_CONFIG, on_progress=lambda *step: seen.append(step))
    assert seen[0] == ("encoding", len(times), BLOCKS)
    assert times.items() <= block_times(out).items()
    assert_same_files(out, folders[2])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["features"]


def test_an_empty_folder_is_fine(folders: Folders, tmp_path: Path) -> None:
    assert build(*folders[:2], tmp_path, BUILD_CONFIG).seconds is not None
    assert_same_files(tmp_path, folders[2])


def test_another_build_into_an_unfinished_folder_is_refused_by_name(
    folders: Folders, tmp_path: Path
) -> None:
    store, sae, _ = folders
    out = tmp_path / "features"
    interrupted(folders, out, "encoding", 3)
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    assert "--seed: 0 → 1)" in build_refusal(store, sae, out, "--seed", 1)
    other = save_sae(store, tmp_path / "other", seed=1)
    with pytest.raises(RunError, match=r"another build \(differing: sae_digest: .* → .*\)"):
        build(store, other, out, BUILD_CONFIG)
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before
    moved = tmp_path / "moved"  # but the same SAE may have moved
    shutil.copytree(sae, moved)
    build(store, moved, out, BUILD_CONFIG)
    assert_same_files(out, folders[2])


@pytest.mark.slow
def test_a_second_build_into_the_same_folder_is_refused(folders: Folders, tmp_path: Path) -> None:
    store, sae, _ = folders
    out, config, told = tmp_path / "features", FeatureConfig(window_tokens=9), []

    def on_progress(what: str, done: int, total: int) -> None:
        if what == "counting":
            given = ("build", "--store", store, "--sae", sae, "--out", out, "--window", 9)
            second = ended("sae-features", *given)
            assert (second.returncode, second.stdout) == (1, "")
            told.append(sentence(second.stderr))

    build(store, sae, out, config, on_progress=on_progress)
    assert told == [f"{out} is being built by another process; wait for it."]
    build(store, sae, tmp_path / "undisturbed", config)
    assert_same_files(out, tmp_path / "undisturbed")


def build_at_once(barrier: Any, answers: Any, store: Path, sae: Path, out: Path) -> None:
    """In a process of its own, with others."""
    for number in range(ROUNDS):
        barrier.wait(120)
        try:
            built = build(store, sae, out / str(number), BUILD_CONFIG)
            answers.put((number, "found" if built.seconds is None else "built"))
        except SaeHarvestError as error:
            answers.put((number, str(error)))


@pytest.mark.slow
def test_of_builds_that_begin_at_once_one_goes_on(folders: Folders, tmp_path: Path) -> None:
    barrier, answers = SERVER.Barrier(3), SERVER.Queue()
    given = (barrier, answers, *folders[:2], tmp_path)
    processes = [SERVER.Process(target=build_at_once, args=given, daemon=True) for _ in range(3)]
    for process in processes:
        process.start()
    told = [answers.get(timeout=300) for _ in range(3 * ROUNDS)]
    for process in processes:
        process.join(30)
    for number in range(ROUNDS):
        mine = [answer for n, answer in told if n == number]
        assert mine.count("built") == 1, mine
        assert_same_files(tmp_path / str(number), folders[2])
        for answer in mine:
            assert answer in ("built", "found") or "is being built by another process" in answer


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "not Parquet"])
def test_a_damaged_block_is_named_and_made_again_alone(
    folders: Folders, tmp_path: Path, damage: str
) -> None:
    out = tmp_path / "features"
    interrupted(folders, out, "encoding", BLOCKS)
    bad, times = out / "firings" / "000005.parquet", block_times(out)
    content = bad.read_bytes()
    flipped = bytes([*content[:1000], content[1000] ^ 1, *content[1001:]])
    damaged = {"cut": content[:-100], "flipped": flipped, "empty": b"", "not Parquet": b"x" * 5000}
    bad.write_bytes(damaged[damage])
    with pytest.raises(RunError, match=r"000005\.parquet is .*damaged .*; delete it") as told:
        build(*folders[:2], out, BUILD_CONFIG)
    assert "\n" not in str(told.value)
    assert not (out / "run.json").exists()
    bad.unlink()
    build(*folders[:2], out, BUILD_CONFIG)
    assert_same_files(out, folders[2])
    after = block_times(out)
    assert {name for name in times if after[name] != times[name]} == {bad.name}


def test_any_damage_to_firings_is_noticed(tmp_path: Path) -> None:
    blocks = encode_blocks(made_case(), tmp_path, 40)
    path = tmp_path / "firings" / "000000.parquet"
    content, whole = path.read_bytes(), blocks.read(0)
    data = len(content) - 8 - struct.unpack("<I", content[-8:-4])[0]
    noticed = 0
    for at in range(0, data, 5):
        path.write_bytes(bytes([*content[:at], content[at] ^ 1 << at % 8, *content[at + 1 :]]))
        try:
            found = blocks.read(0)
        except RunError:
            noticed += 1
            continue
        for name in ("starts", "row", "value"):  # a bit that nothing depends on
            np.testing.assert_array_equal(getattr(found, name), getattr(whole, name))
    assert noticed > 0.95 * data / 5
    for length in range(0, len(content), 41):
        path.write_bytes(content[:length])
        with pytest.raises(RunError, match=r"000000\.parquet is missing or damaged"):
            blocks.read(0)


def test_entries_are_those_of_a_finished_folder(folders: Folders) -> None:
    assert {path.name for path in folders[2].iterdir()} == ENTRIES
    assert len(block_times(folders[2])) == BLOCKS
