"""A harvest on a Ray cluster of two nodes, one of which is lost midway."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from ray.cluster_utils import Cluster

from sae_harvest.common.errors import RunError
from sae_harvest.harvest.run.log import log_path
from sae_harvest.harvest.run.pool import open_pool
from tests.commands import PATIENCE, digest_of, invoke, options, wait_for
from tests.forked import forked
from tests.shards import SITES, local_model
from tests.told import alive, gone, have_done_a_shard, started

pytestmark = pytest.mark.slow

NODE = {"num_cpus": 1, "object_store_memory": 80 << 20}


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Two nodes of one core each, both on this machine."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    quiet = {"include_dashboard": False, "include_log_monitor": False, "no_monitor": True}
    started = Cluster(initialize_head=True, head_node_args=NODE | quiet)
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


def test_a_harvest_that_loses_a_node_ends_with_the_digest_of_an_undisturbed_one(
    tmp_path: Path, model_folder: Path, corpus_file: Path, cluster: Cluster
) -> None:
    place = tmp_path / "store"
    sizes = {"tokens": 12_800, "shard_rows": 64}
    elsewhere = ("--workers", 2, "--address", cluster.address)
    raylets = [node.all_processes["raylet"][0].process.pid for node in cluster.worker_nodes]

    def said() -> list[str]:
        path = log_path(str(place))
        assert path is not None
        lines = path.read_text().splitlines() if path.exists() else []
        return [line.partition("  ")[2] for line in lines]  # without the time

    def at_work() -> int | None:
        """A raylet, not the head's, whose worker has done a shard, and so has more to lose."""
        busy = have_done_a_shard(said())
        return next((raylet for raylet in raylets if busy & {*processes_of(raylet)}), None)

    with forked("harvest", *options(model_folder, corpus_file, place, **sizes), *elsewhere) as run:
        assert wait_for(at_work), said()
        lost = at_work()
        assert lost is not None
        victims = processes_of(lost)
        for pid in victims:
            os.kill(pid, signal.SIGKILL)
        printed, told = run.communicate(timeout=PATIENCE)
    assert run.returncode == 0, told
    workers = started(said())
    assert len(set(victims) & set(workers)) == 1
    deaths = gone(said())  # on busy cores, also of a worker that was about to start there
    assert any(re.search(r"is gone: .*shards? .* to be done by another", d) for d in deaths)
    undisturbed = invoke(*options(model_folder, corpus_file, tmp_path / "other", **sizes))
    assert digest_of(undisturbed) in printed

    # The cluster is left as it was, but for our workers.
    assert wait_for(lambda: not any(map(alive, workers)))
    assert all(alive(pid) for pid in raylets if pid != lost)


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
