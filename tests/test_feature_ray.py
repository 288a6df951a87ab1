"""A feature build shared out among processes: the same bytes for any number of them."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.cluster_utils import Cluster

from sae_harvest.common.errors import RunError
from sae_harvest.pipelines.features.building.build import build
from tests.commands import session_processes
from tests.feature_cases import (
    BUILD_CONFIG,
    assert_same_files,
    build_refusal,
    contents,
    encode_blocks,
    made_case,
)
from tests.forked import SERVER

pytestmark = pytest.mark.slow
Folders = tuple[Path, Path, Path]


def test_blocks_are_the_same_bytes_in_any_order_by_any_process(tmp_path: Path) -> None:
    case = made_case()
    encode_blocks(case, tmp_path / "one", 4)
    several = [
        SERVER.Process(target=encode_blocks, args=(case, tmp_path / "several", 4, numbers))
        for numbers in ([9, 1, 4, 7], [3, 1, 0, 8, 9], [2, 6, 5, 4])  # some are made twice
    ]
    for process in several:
        process.start()
    for process in several:
        process.join(120)
        assert process.exitcode == 0
    assert contents(tmp_path / "several") == contents(tmp_path / "one")


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    """The address of a cluster of this machine: for what does not ask how Ray begins and ends."""
    head = {"num_cpus": 2, "object_store_memory": 80 << 20, "include_dashboard": False}
    started = Cluster(initialize_head=True, head_node_args=head)
    yield started.address
    started.shutdown()


def test_tables_of_several_workers_are_the_bytes_of_one_process(
    folders: Folders, tmp_path: Path, cluster: str
) -> None:
    seen: list[tuple[str, int, int]] = []
    build(
        *folders[:2],
        tmp_path / "out",
        BUILD_CONFIG,
        workers=2,
        address=cluster,
        on_progress=lambda *step: seen.append(step),
    )
    assert_same_files(tmp_path / "out", folders[2])
    assert [step for step in seen if step[0] == "encoding"] == [
        ("encoding", done, 8) for done in range(9)
    ]
    assert len([step for step in seen if step[0] == "counting"]) == 2
    assert not ray.is_initialized()


def test_a_worker_that_is_killed_costs_only_its_block(
    folders: Folders, tmp_path: Path, cluster: str
) -> None:
    killed: list[int] = []

    def kill_a_worker() -> None:
        while not (found := at_work()):
            time.sleep(0.01)
        os.kill(found[0], signal.SIGKILL)
        killed.append(found[0])

    def begin(what: str, done: int, total: int) -> None:
        if (what, done) == ("encoding", 0):
            threading.Thread(target=kill_a_worker, daemon=True).start()

    out = tmp_path / "out"
    build(*folders[:2], out, BUILD_CONFIG, workers=2, address=cluster, on_progress=begin)
    assert len(killed) == 1
    assert_same_files(out, folders[2])


def at_work() -> list[int]:
    """Workers that this process has started, and that are doing something."""
    found = session_processes(os.getsid(0)).items()
    return [n for n, name in found if name.startswith("ray::_call") and os.getpid() in above(n)]


def above(process: int) -> list[int]:
    """A process's parent, its parent, and so on."""
    try:
        stat = (Path("/proc") / str(process) / "stat").read_text()
    except OSError:  # gone
        return []
    parent = int(stat.rpartition(")")[2].split()[1])
    return [parent, *above(parent)] if parent > 1 else []


def test_what_a_worker_refuses_is_said_in_its_words(
    folders: Folders, tmp_path: Path, cluster: str
) -> None:
    out = tmp_path / "out"

    def damage(what: str, done: int, total: int) -> None:
        if (what, done) == ("encoding", 8):
            bad = out / "firings" / "000005.parquet"
            content = bytearray(bad.read_bytes())
            content[1000] ^= 1
            bad.write_bytes(content)

    with pytest.raises(RunError, match=r"000005\.parquet is .*damaged .*; delete it") as told:
        build(*folders[:2], out, BUILD_CONFIG, workers=1, address=cluster, on_progress=damage)
    assert "\n" not in str(told.value)
    (out / "firings" / "000005.parquet").unlink()
    build(*folders[:2], out, BUILD_CONFIG)  # and it goes on without Ray
    assert_same_files(out, folders[2])


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--workers", 999), "--workers 999 is more than the"),
        (("--workers", 1, "--address", "127.0.0.1:1"), "cluster at 127.0.0.1:1 could not be"),
        (("--workers", 1, "--address", "head"), "--address head: expected auto, or HOST:PORT"),
    ],
)
def test_what_ray_cannot_give_is_one_sentence(
    folders: Folders, tmp_path: Path, options: tuple[Any, ...], said: str
) -> None:
    assert said in build_refusal(folders[0], folders[1], tmp_path / "out", *options)
    assert not ray.is_initialized()
