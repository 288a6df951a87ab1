"""Two drivers at one place: one that fails takes nothing from the other."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from sae_harvest.common.errors import InputError
from sae_harvest.harvest.run import status
from sae_harvest.harvest.run.config import HarvestConfig
from sae_harvest.harvest.run.driver import Execution, Result, run
from sae_harvest.harvest.run.worker import Done, ShardWorker
from sae_harvest.harvest.text.corpus import CorpusSpec
from sae_harvest.store.layout import Plan
from sae_harvest.store.maintenance.verify import verify
from sae_harvest.store.objects import LocalObjects, Objects
from sae_harvest.store.writer import Shard, create_store, discard, write_shard
from tests.synthetic import make_plan, make_shard

MEANS = Execution(workers=0, device="cpu")


@pytest.fixture
def config(model_folder: Path, corpus_file: Path) -> HarvestConfig:
    return HarvestConfig(
        model=str(model_folder),
        corpus=CorpusSpec(name=str(corpus_file)),
        sites=("resid_post.1",),
        tokens=2048,
        context_length=32,
        shard_rows=1024,
        compute_dtype="float32",
    )


def test_a_failing_driver_leaves_what_another_is_making(
    config: HarvestConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # an interval that busy cores can keep: a driver that is late by several counts as gone
    monkeypatch.setattr(status, "INTERVAL_SECONDS", 2.0)
    place = tmp_path / "store"
    published, failed = threading.Event(), threading.Event()
    harvest = ShardWorker.harvest
    workers: list[ShardWorker] = []
    results: list[Result] = []
    other = threading.Thread(target=lambda: results.append(run(config, place, MEANS)))

    def harvest_or_fail(worker: ShardWorker, objects: Objects, plan: Plan, shard: Shard) -> Done:
        if not workers:  # the first driver has created the store; now comes the other one
            workers.append(worker)
            other.start()
        if worker is workers[0]:
            assert published.wait(60)
            raise InputError("This machine has other weights.")
        done = harvest(worker, objects, plan, shard)
        published.set()
        assert failed.wait(60)
        return done

    monkeypatch.setattr(ShardWorker, "harvest", harvest_or_fail)
    try:
        with pytest.raises(InputError, match="other weights"):
            run(config, place, MEANS)
    finally:
        failed.set()
        other.join(60)
    assert results[0].digest is not None
    assert verify(LocalObjects(place), lambda done, total: None).damage == []


def test_a_failing_driver_alone_leaves_the_place_empty(
    config: HarvestConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(status, "INTERVAL_SECONDS", 0.1)

    def write_and_fail(worker: ShardWorker, objects: Objects, plan: Plan, shard: Shard) -> Done:
        harvest(worker, objects, plan, shard)
        raise InputError("It does not fit float16.")

    harvest = ShardWorker.harvest
    monkeypatch.setattr(ShardWorker, "harvest", write_and_fail)
    with pytest.raises(InputError, match="float16"):
        run(config, tmp_path / "store", MEANS)
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_only_the_shards_named_are_discarded(tmp_path: Path, dtype: str) -> None:
    objects, plan = LocalObjects(tmp_path / "store"), make_plan(dtype=dtype)
    create_store(objects, plan, {})
    write_shard(objects, plan, make_shard(plan, 0))
    before = objects.keys("")
    write_shard(objects, plan, make_shard(plan, 1))
    discard(objects, plan, [1])
    assert objects.keys("") == before
    discard(objects, plan, [0])
    assert objects.first_key() is None
    assert not (tmp_path / "store").exists()
