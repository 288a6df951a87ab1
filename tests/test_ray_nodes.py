"""A harvest on a Ray cluster of three nodes, one of which is lost midway."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.cluster_utils import Cluster

from harvest.log import log_path
from harvest.pool import open_pool
from store.errors import RunError
from store.objects import LocalObjects
from tests.commands import commits, digest_of, invoke, options, wait_for
from tests.forked import forked
from tests.shards import SITES, local_model, make_inputs, make_plan, slow
from tests.told import alive, gone, have_done_a_shard, started

pytestmark = pytest.mark.slow

COUNT = 200  # far more than are done before a death is noticed
NODE = {"num_cpus": 1, "object_store_memory": 80 << 20}


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Three nodes of one core each, all on this machine."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    started = Cluster(initialize_head=True, head_node_args=NODE | {"include_dashboard": False})
    for _ in range(2):
        started.add_node(**NODE)
    yield started
    started.shutdown()


def processes_of(raylet: int) -> list[int]:
    """A raylet and its children: its workers and agents."""
    found = [raylet]
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(stat.read_text().rpartition(")")[2].split()[1])
        except (FileNotFoundError, ProcessLookupError):
            continue
        if parent == raylet:
            found.append(int(stat.parent.name))
    return found


def test_a_node_that_is_lost_costs_only_its_shards_in_flight(
    tmp_path: Path, model_folder: Path, cluster: Cluster, capfd: pytest.CaptureFixture[str]
) -> None:
    model = local_model(model_folder)
    plan = make_plan(model)
    told: list[str] = []
    records: dict[int, dict[str, Any]] = {}
    objects = slow(tmp_path / "store", 0.5)
    inputs = make_inputs(COUNT)
    waiting = list(inputs)
    victims: list[int] = []
    with open_pool(3, model, SITES, "float32", "cpu", cluster.address, told.append) as pool:
        assert pool.widths() == {SITES[0]: 32}
        assert wait_for(lambda: pool.collect() == [] and len(started(told)) == 3, 60)
        raylets = [node.all_processes["raylet"][0].process.pid for node in cluster.worker_nodes]
        # New shards come until the death is known, so that it cannot go unnoticed; nobody dies
        # before every worker has done a shard, so that all of them have some to lose.
        while pool.in_flight() or not gone(told):
            while len(pool.in_flight()) < pool.capacity and not gone(told):
                pool.submit(objects, plan, waiting.pop(0))
            if not victims and have_done_a_shard(told) == set(started(told)):
                victims = processes_of(raylets[0])
                for pid in victims:
                    os.kill(pid, signal.SIGKILL)
            records |= {record["shard"]: record for record in pool.collect()}
            pool.rows_done()
    assert len(set(victims) & set(started(told))) == 1
    (death,) = gone(told)
    assert re.search(r"is gone: .*shards? .* to be done by another", death)
    with open_pool(0, model, SITES, "float32", "cpu", None, told.append) as pool:
        for shard in inputs[: len(inputs) - len(waiting)]:
            pool.submit(LocalObjects(tmp_path / "other"), plan, shard)
        expected: dict[int, dict[str, Any]] = {}
        while pool.in_flight():
            expected |= {record["shard"]: record for record in pool.collect()}
    assert records == expected

    # The cluster is left as it was, but for our workers.
    assert wait_for(lambda: not any(map(alive, started(told))), 10)
    assert all(alive(pid) for pid in raylets[1:])
    assert not ray.is_initialized()
    assert capfd.readouterr().out == ""


def test_a_harvest_that_loses_a_node_ends_with_the_digest_of_an_undisturbed_one(
    tmp_path: Path, model_folder: Path, corpus_file: Path, cluster: Cluster
) -> None:
    node = cluster.add_node(**NODE)  # in place of the one lost above
    assert wait_for(lambda: sum(n["Alive"] for n in cluster.global_state.node_table()) == 3, 60)
    place = tmp_path / "store"
    given = options(model_folder, corpus_file, place, tokens=14_016, shard_rows=64)
    elsewhere = ("--workers", 3, "--address", cluster.address)
    with forked("harvest", *given, *elsewhere) as process:
        assert wait_for(lambda: commits(place) >= 20, 120)
        assert commits(place) < 200
        for pid in processes_of(node.all_processes["raylet"][0].process.pid):
            os.kill(pid, signal.SIGKILL)
        printed, told = process.communicate(timeout=120)
    assert process.returncode == 0, told
    undisturbed = invoke(
        *options(model_folder, corpus_file, tmp_path / "other", tokens=14_016, shard_rows=64)
    )
    assert digest_of(undisturbed) in printed
    assert " is gone: " in log_path(str(place)).read_text()


def test_more_workers_than_the_cluster_has_room_for_are_refused(
    model_folder: Path, cluster: Cluster
) -> None:
    with (
        pytest.raises(RunError, match=r"--workers 9: each needs a core, and Ray has . cores \(. "),
        open_pool(9, local_model(model_folder), SITES, "float32", "cpu", cluster.address, print),
    ):
        pass


@pytest.mark.parametrize(
    ("address", "sentence"),
    [
        ("127.0.0.1:1", "The Ray cluster at 127.0.0.1:1 could not be joined .*refused"),
        ("127.0.0.1:99999", "The Ray cluster at 127.0.0.1:99999 could not be joined"),
        ("head", "--address head: expected auto, or HOST:PORT"),
        ("ray://head:10001", "--address ray://head:10001: expected auto, or HOST:PORT"),
    ],
)
def test_a_cluster_that_is_not_there_is_refused(
    model_folder: Path, address: str, sentence: str
) -> None:
    with (
        pytest.raises(RunError, match=sentence),
        open_pool(1, local_model(model_folder), SITES, "float32", "cpu", address, print),
    ):
        pass
