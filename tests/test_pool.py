"""Shards through a worker in this process, and the sizes of workers on other machines."""

from __future__ import annotations

import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from sae_harvest.common import ray_cluster as cluster
from sae_harvest.common.errors import InputError
from sae_harvest.harvest.run import ray_nodes as raycluster
from sae_harvest.harvest.run.worker import ShardWorker
from sae_harvest.store.layout import Plan
from sae_harvest.store.objects import LocalObjects
from tests.shards import SITES, local_model, make_inputs, make_plan, opened_pool, through_pool

COUNT = 6


@pytest.fixture(scope="module")
def plan(model_folder: Path) -> Plan:
    return make_plan(local_model(model_folder))


def test_one_process_gives_a_record_for_each_shard(
    model_folder: Path, plan: Plan, tmp_path: Path
) -> None:
    with opened_pool(model_folder, 0) as pool:
        assert pool.widths() == {SITES[0]: 32}
        expected = through_pool(pool, LocalObjects(tmp_path), plan, make_inputs(COUNT))
        assert pool.rows_done() == COUNT * plan.shard_rows
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
    with opened_pool(model_folder, 0) as pool:
        pool.submit(LocalObjects(tmp_path), plan, shard)
        assert pool.in_flight() == [0]
        with pytest.raises(InputError, match="gives token 400, the model's vocabulary ends at 399"):
            through_pool(pool, LocalObjects(tmp_path), plan, [])


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
