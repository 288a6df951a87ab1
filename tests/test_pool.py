"""Pools of workers: what comes back, and what a worker that dies costs."""

from __future__ import annotations

import os
import re
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sae_harvest.common import ray_cluster as cluster
from sae_harvest.common.errors import InputError, RunError
from sae_harvest.harvest.run import ray_nodes as raycluster
from sae_harvest.harvest.run import ray_pool as raypool
from sae_harvest.harvest.run.pool import Pool, open_pool
from sae_harvest.harvest.run.worker import ShardWorker
from sae_harvest.store.layout import Plan
from sae_harvest.store.objects import LocalObjects, Objects
from sae_harvest.store.writer import Shard
from tests.commands import wait_for
from tests.shards import SITES, deadly, local_model, make_inputs, make_plan
from tests.told import alive, gone, started

COUNT = 6

Records = dict[int, dict[str, Any]]


def opened(model_folder: Path, workers: int, report: Any = print) -> Any:
    model = local_model(model_folder)
    return open_pool(workers, model, SITES, "float32", "cpu", address=None, report=report)


def work(pool: Pool, objects: Objects, plan: Plan, shards: list[Shard]) -> Records:
    """Every shard through the pool, as the driver does it."""
    waiting, records = list(shards), {}
    while waiting or pool.in_flight():
        while waiting and len(pool.in_flight()) < pool.capacity:
            pool.submit(objects, plan, waiting.pop(0))
        for record in pool.collect():
            records[record["shard"]] = record
        pool.rows_done()
    return records


def collect_into(pool: Pool, records: Records) -> None:
    """Collect until it fails."""
    while True:
        records |= {record["shard"]: record for record in pool.collect()}


@pytest.fixture(scope="module")
def plan(model_folder: Path) -> Plan:
    return make_plan(local_model(model_folder))


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory, model_folder: Path, plan: Plan) -> Records:
    """The records of the shards, made in this process."""
    objects = LocalObjects(tmp_path_factory.mktemp("expected"))
    with opened(model_folder, 0) as pool:
        assert pool.widths() == {SITES[0]: 32}
        records = work(pool, objects, plan, make_inputs(COUNT))
        assert pool.rows_done() == COUNT * plan.shard_rows
    return records


def test_one_process_gives_a_record_for_each_shard(expected: Records) -> None:
    assert sorted(expected) == list(range(COUNT))
    assert [expected[u]["cursor"] for u in range(COUNT)] == [{"shard": u} for u in range(COUNT)]


def test_activations_are_those_of_a_plain_forward_pass(
    model_folder: Path, plan: Plan, tmp_path: Path
) -> None:
    from transformers import GPT2LMHeadModel

    shard = make_inputs(1)[0]
    worker = ShardWorker(local_model(model_folder), SITES, "float32", "cpu", threads=None)
    x, norms = worker.activations(plan, shard.tokens)
    model = GPT2LMHeadModel.from_pretrained(model_folder).eval()
    with torch.no_grad():
        ids = torch.from_numpy(shard.tokens.astype(np.int64))
        states = model(ids, output_hidden_states=True).hidden_states[2].reshape(-1, 32)
    assert x[SITES[0]].dtype == np.float16
    np.testing.assert_allclose(x[SITES[0]], states.numpy(), rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(norms[SITES[0]], np.linalg.norm(states, axis=1), rtol=1e-5)


def test_a_store_of_int8_is_given_float16_to_quantize(model_folder: Path, plan: Plan) -> None:
    worker = ShardWorker(local_model(model_folder), SITES, "float32", "cpu", threads=None)
    tokens = make_inputs(1)[0].tokens
    codes, _ = worker.activations(plan.model_copy(update={"dtype": "int8"}), tokens)
    halves, _ = worker.activations(plan, tokens)
    assert codes[SITES[0]].dtype == np.float16
    np.testing.assert_array_equal(codes[SITES[0]], halves[SITES[0]])


def test_an_error_of_a_worker_reaches_the_driver(
    model_folder: Path, plan: Plan, tmp_path: Path
) -> None:
    shard = make_inputs(1)[0]
    shard.tokens[3, 4] = 400
    with opened(model_folder, 0) as pool:
        pool.submit(LocalObjects(tmp_path), plan, shard)
        assert pool.in_flight() == [0]
        with pytest.raises(InputError, match="gives token 400, the model's vocabulary ends at 399"):
            work(pool, LocalObjects(tmp_path), plan, [])


def test_a_machine_with_other_weights_is_refused(
    model_folder: Path, plan: Plan, tmp_path: Path
) -> None:
    other = plan.model_copy(update={"model": plan.model | {"weights": "xxh3:other"}})
    model = local_model(model_folder)
    worker = ShardWorker(model, SITES, "float32", "cpu", None, elsewhere=True)
    shard = make_inputs(1)[0]
    with pytest.raises(InputError, match=re.escape(f"{os.uname().nodename} has other weights of")):
        worker.harvest(LocalObjects(tmp_path), other, shard)
    assert worker.harvest(LocalObjects(tmp_path), plan, shard).record["shard"] == 0


def test_a_machine_without_the_model_is_named(tmp_path: Path, model_folder: Path) -> None:
    moved = tmp_path / "moved"
    moved.symlink_to(model_folder)
    model = local_model(moved).__class__(str(moved), str(moved), None, "directory")
    worker = ShardWorker(model, SITES, "float32", "cpu", None, elsewhere=True)
    moved.unlink()
    with pytest.raises(InputError, match=f"On {re.escape(os.uname().nodename)}: .*moved"):
        worker.widths()


@pytest.mark.parametrize(
    ("nodes", "workers", "gpu", "threads"),
    [
        ([(8, 0)], 1, False, 8),
        ([(8, 0)], 3, False, 2),
        ([(8, 0)], 9, False, None),
        ([(8, 0), (8, 0), (4, 0)], 1, False, 8),  # a worker is on one node
        ([(8, 0), (8, 0), (4, 0)], 3, False, 4),
        ([(8, 0), (8, 0), (4, 0)], 5, False, 4),
        ([(8, 0), (8, 0)], 3, False, 4),  # not 16 // 3 = 5: only two would find room
        ([(64, 4), (8, 0)], 4, True, 16),
        ([(64, 4), (8, 0)], 1, True, 16),
        ([(64, 4), (8, 0)], 5, True, None),
        ([(2, 4)], 2, True, 1),
        ([(8, 0)], 1, True, None),
        ([], 1, False, None),
    ],
)
def test_workers_share_the_cores_so_that_all_find_room(
    nodes: list[tuple[int, int]], workers: int, gpu: bool, threads: int | None
) -> None:
    assert cluster.share(nodes, workers, gpu) == threads


def test_a_node_with_other_software_is_named() -> None:
    expected = {"sae-harvest": "0.2.0", "torch": "2.13.0"}
    there = {"host": "node7", "versions": expected}
    assert raycluster.mismatch(expected, there) is None
    there["versions"] = {"sae-harvest": "0.1.0", "torch": "2.13.0"}
    found = raycluster.mismatch(expected, there)
    assert found == (
        "The Ray node node7 has sae-harvest 0.1.0 instead of 0.2.0; install the same on every node."
    )


@pytest.mark.slow
def test_what_a_killed_worker_had_is_done_by_others(
    tmp_path: Path,
    model_folder: Path,
    plan: Plan,
    expected: Records,
    capfd: pytest.CaptureFixture[str],
) -> None:
    told: list[str] = []
    before = signal.getsignal(signal.SIGTERM)
    with opened(model_folder, 2, told.append) as pool:
        assert signal.getsignal(signal.SIGTERM) is before
        assert pool.widths() == {SITES[0]: 32}
        records = work(pool, deadly(tmp_path / "a", 2, times=1), plan, make_inputs(COUNT))
        assert records == expected
        assert len([line for line in told if line.startswith("shard ")]) == COUNT
        (death,) = gone(told)
        assert re.search(r"worker \d on .* \(pid \d+\) is gone: its process was killed", death)
        assert re.search(r"shards? .*\b2\b.* to be done by another", death)
        assert wait_for(lambda: pool.rows_done() == COUNT * plan.shard_rows)

        # Idle workers that are killed are noticed as well, and replaced.
        assert wait_for(lambda: pool.collect() == [] and len(started(told)) == 3)
        for pid in filter(alive, started(told)):
            os.kill(pid, signal.SIGKILL)
        assert wait_for(lambda: (pool.collect(), pool.rows_done()) and len(gone(told)) == 3)
        records = work(pool, LocalObjects(tmp_path / "b"), plan, make_inputs(COUNT))
        assert records == expected
    assert signal.getsignal(signal.SIGTERM) is before
    assert wait_for(lambda: not any(alive(pid) for pid in started(told)))
    assert capfd.readouterr() == ("", "")  # Ray would print each death


@pytest.mark.slow
def test_a_shard_that_kills_its_workers_is_named_and_the_others_are_done(
    tmp_path: Path,
    model_folder: Path,
    plan: Plan,
    expected: Records,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    told: list[str] = []
    records: Records = {}
    objects = deadly(tmp_path, 1, times=99)
    monkeypatch.setattr(raypool, "DEATHS", 2)
    with opened(model_folder, 1, told.append) as pool:
        for shard in make_inputs(2):
            pool.submit(objects, plan, shard)
        with pytest.raises(RunError, match=r"Shard 1 has killed 2 workers.*fewer --workers"):
            collect_into(pool, records)
        assert pool.in_flight() == [1]
        assert records == {0: expected[0]}
        assert len(list(tmp_path.glob("killed.*"))) == 2

        # The replacement has just been asked for and is not given the time to come up.
        monkeypatch.setattr(raypool, "START_SECONDS", 0.1)
        with pytest.raises(RunError, match=r"No worker came up .* Ray has \d+ cores \(\d+ free\)"):
            collect_into(pool, records)
