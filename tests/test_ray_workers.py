"""Ray workers of harvests and feature builds, on one cluster that is there before and after.

Whatever asks how Ray itself begins and ends is in test_namesakes, test_crash and test_ray_nodes.
"""

from __future__ import annotations

import os
import re
import shutil
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
from sae_harvest.harvest.run import ray_pool as raypool
from sae_harvest.harvest.run.pool import Pool
from sae_harvest.pipelines.features.building.build import build
from sae_harvest.store.layout import Plan
from sae_harvest.store.objects import LocalObjects
from tests.commands import invoke, options, refusal, session_processes, wait_for
from tests.feature_cases import BUILD_CONFIG, assert_same_files, build_refusal
from tests.shards import (
    SITES,
    Records,
    deadly,
    local_model,
    make_inputs,
    make_plan,
    opened_pool,
    through_pool,
)
from tests.told import alive, gone, started

pytestmark = pytest.mark.slow
Folders = tuple[Path, Path, Path]

COUNT = 6  # shards


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    """The address of a cluster of two cores of this machine."""
    quiet = {"include_dashboard": False, "include_log_monitor": False, "no_monitor": True}
    head = {"num_cpus": 2, "object_store_memory": 80 << 20} | quiet
    begun = Cluster(initialize_head=True, head_node_args=head)
    yield begun.address
    begun.shutdown()


@pytest.fixture(scope="module")
def plan(model_folder: Path) -> Plan:
    return make_plan(local_model(model_folder))


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory, model_folder: Path, plan: Plan) -> Records:
    """The records of the shards, made in this process."""
    objects = LocalObjects(tmp_path_factory.mktemp("expected"))
    with opened_pool(model_folder, 0) as pool:
        return through_pool(pool, objects, plan, make_inputs(COUNT))


def test_what_a_killed_worker_had_is_done_by_others(
    tmp_path: Path,
    model_folder: Path,
    plan: Plan,
    expected: Records,
    cluster: str,
    capfd: pytest.CaptureFixture[str],
) -> None:
    told: list[str] = []
    before = signal.getsignal(signal.SIGTERM)
    with opened_pool(model_folder, 2, told.append, cluster) as pool:
        assert signal.getsignal(signal.SIGTERM) is before
        assert pool.widths() == {SITES[0]: 32}
        records = through_pool(pool, deadly(tmp_path / "a", 2, times=1), plan, make_inputs(COUNT))
        assert records == expected
        assert len([line for line in told if line.startswith("shard ")]) == COUNT
        (death,) = gone(told)
        assert re.search(r"worker \d on .* \(pid \d+\) is gone: its process was killed", death)
        assert re.search(r"shards? .*\b2\b.* to be done by another", death)
        assert wait_for(lambda: pool.rows_done() == COUNT * plan.shard_rows)

        # An idle worker that is killed is noticed as well, and replaced.
        assert wait_for(lambda: pool.collect() == [] and len(started(told)) == 3)
        os.kill(next(filter(alive, started(told))), signal.SIGKILL)
        assert wait_for(lambda: (pool.collect(), pool.rows_done()) and len(gone(told)) == 2)
        records = through_pool(pool, LocalObjects(tmp_path / "b"), plan, make_inputs(COUNT))
        assert records == expected
    assert signal.getsignal(signal.SIGTERM) is before
    assert wait_for(lambda: not any(alive(pid) for pid in started(told)))
    assert capfd.readouterr() == ("", "")  # Ray would print each death


def test_a_shard_that_kills_its_workers_is_named_and_the_others_are_done(
    tmp_path: Path,
    model_folder: Path,
    plan: Plan,
    expected: Records,
    cluster: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    told: list[str] = []
    records: Records = {}
    objects = deadly(tmp_path, 1, times=99)
    monkeypatch.setattr(raypool, "DEATHS", 2)
    with opened_pool(model_folder, 1, told.append, cluster) as pool:
        for shard in make_inputs(2):
            pool.submit(objects, plan, shard)
        with pytest.raises(RunError, match=r"Shard 1 has killed 2 workers.*fewer --workers"):
            collect_into(pool, records)
        assert pool.in_flight() == [1]
        assert records == {0: expected[0]}
        assert len(list(tmp_path.glob("killed.*"))) == 2

        # The replacement has just been asked for and is not given the time to come up.
        monkeypatch.setattr(raypool, "START_SECONDS", 0.1)
        with pytest.raises(RunError, match=r"No worker started .* Ray has \d+ cores \(\d+ free\)"):
            collect_into(pool, records)


def collect_into(pool: Pool, records: Records) -> None:
    """Collect until it fails."""
    while True:
        records |= {record["shard"]: record for record in pool.collect()}


def test_weights_that_a_worker_cannot_read_are_refused_in_one_sentence(
    tmp_path: Path, model_folder: Path, corpus_file: Path, cluster: str
) -> None:
    cut = Path(shutil.copytree(model_folder, tmp_path / "cut"))
    os.truncate(cut / "model.safetensors", 20_000)
    arguments = options(cut, corpus_file, tmp_path / "store", workers=1, address=cluster)
    assert f"The model of {cut} can't be loaded" in refusal(invoke(*arguments))
    assert not (tmp_path / "store").exists()
    assert not ray.is_initialized()


def test_tables_are_the_bytes_of_one_process_though_a_worker_is_killed(
    folders: Folders, tmp_path: Path, cluster: str
) -> None:
    killed: list[int] = []
    seen: list[tuple[str, int, int]] = []

    def kill_a_worker() -> None:
        while not (found := at_work()):
            time.sleep(0.01)
        os.kill(found[0], signal.SIGKILL)
        killed.append(found[0])

    def progress(what: str, done: int, total: int) -> None:
        seen.append((what, done, total))
        if (what, done) == ("encoding", 0):
            threading.Thread(target=kill_a_worker, daemon=True).start()

    out = tmp_path / "out"
    build(*folders[:2], out, BUILD_CONFIG, workers=2, address=cluster, on_progress=progress)
    assert len(killed) == 1
    assert_same_files(out, folders[2])
    encoding = [step for step in seen if step[0] == "encoding"]
    assert encoding == [("encoding", done, 8) for done in range(9)]
    assert len([step for step in seen if step[0] == "counting"]) == 2
    assert not ray.is_initialized()


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
    ("arguments", "said"),
    [
        (("--workers", 999), "--workers 999 is more than the"),
        (("--workers", 1, "--address", "127.0.0.1:1"), "cluster at 127.0.0.1:1 could not be"),
        (("--workers", 1, "--address", "head"), "--address head: expected auto, or HOST:PORT"),
    ],
)
def test_what_ray_cannot_give_is_one_sentence(
    folders: Folders, tmp_path: Path, arguments: tuple[Any, ...], said: str
) -> None:
    assert said in build_refusal(folders[0], folders[1], tmp_path / "out", *arguments)
    assert not ray.is_initialized()
