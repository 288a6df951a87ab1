"""The store: what is written is read back, and what it consists of exists wholly or not at all."""

from __future__ import annotations

import errno
import gc
import os
import subprocess
import sys
import threading
import weakref
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

import numpy as np
import pytest

from sae_harvest.common.errors import (
    DamagedError,
    InputError,
    NotAStoreError,
    PlanMismatchError,
    StoreError,
    UnfinishedError,
)
from sae_harvest.store import layout
from sae_harvest.store.commits import commit_shard, read_plan
from sae_harvest.store.maintenance.verify import verify
from sae_harvest.store.objects import LocalObjects, open_objects
from sae_harvest.store.reader import ActivationStore
from sae_harvest.store.records import decode_record, digest_of, encode_record
from sae_harvest.store.rules import RowRule
from sae_harvest.store.seals import seal
from sae_harvest.store.writer import create_store, write_shard
from tests.synthetic import CONTEXTS, SITE, add_shards, make_plan, make_shard, make_store, rows_of


def no_progress(done: int, total: int) -> None:
    pass


@pytest.fixture
def objects(tmp_path: Path) -> LocalObjects:
    return LocalObjects(tmp_path / "s")


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_rows_come_back_exactly(objects: LocalObjects, dtype: str) -> None:
    plan = make_store(objects, make_plan(dtype=dtype))
    store = ActivationStore.open(objects.place)
    expected = rows_of(plan).astype(dtype)
    assert np.array_equal(store.read(SITE, 0, store.n_rows), expected)
    assert np.array_equal(store.read(SITE, 100, 901), expected[100:901])
    assert store.read(SITE, 7, 7).shape == (0, 8)
    assert np.array_equal(store.tokens(7, 9), np.arange(7 * 16, 9 * 16).reshape(2, 16))
    norms = np.linalg.norm(rows_of(plan)[:300], axis=1)
    assert np.array_equal(store.norms(SITE, 0, 300), norms)
    for outside in ((0, 1601), (-1, 3), (5, 4)):
        with pytest.raises(ValueError, match="outside"):
            store.read(SITE, *outside)


def test_plain_zarr_and_dask_read_the_same_without_us(
    objects: LocalObjects, tmp_path: Path
) -> None:
    make_store(objects)
    script = f"""
import sys, numpy as np, zarr, dask.array
group = zarr.open_group({objects.place!r}, mode="r")
x = group["activations/{SITE}"]
lazy = dask.array.from_zarr({objects.place!r}, component="activations/{SITE}")
np.save({str(tmp_path / "x.npy")!r}, x[:])
np.save({str(tmp_path / "lazy.npy")!r}, lazy.compute())
assert group.attrs["context_length"] == 16 and group["tokens"].shape == ({CONTEXTS}, 16)
assert not {{"store", "harvest", "train", "pipelines"}} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-I", "-c", script], check=True, cwd=tmp_path)
    ours = ActivationStore.open(objects.place).read(SITE, 0, CONTEXTS * 16)
    assert np.array_equal(np.load(tmp_path / "x.npy"), ours)
    assert np.array_equal(np.load(tmp_path / "lazy.npy"), ours)


def test_a_shard_exists_only_with_its_commit(objects: LocalObjects) -> None:
    plan = make_plan()
    create_store(objects, plan, {})
    add_shards(objects, plan, range(12))
    last = write_shard(objects, plan, make_shard(plan, 12))
    with pytest.raises(UnfinishedError, match="12 shards are committed and none is sealed"):
        ActivationStore.open(objects.place)
    with pytest.raises(DamagedError, match=r"commits/000012\.json is missing"):
        seal(objects, plan, 13)
    commit_shard(objects, last)
    seal(objects, plan, 13)
    assert ActivationStore.open(objects.place).n_rows == CONTEXTS * 16


@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_digest_does_not_depend_on_order_or_repetition(tmp_path: Path, dtype: str) -> None:
    plan = make_store(tmp_path / "a", make_plan(dtype=dtype))
    objects = LocalObjects(tmp_path / "b")
    create_store(objects, plan, {"torch": "another version"})
    add_shards(objects, plan, [5, 5, *reversed(range(13))])
    digest = seal(objects, plan, 13)["digest"]
    assert digest == ActivationStore.open(tmp_path / "a").digest
    make_store(tmp_path / "c", make_plan(seed=1, dtype=dtype))
    assert ActivationStore.open(tmp_path / "c").digest != digest


def test_an_uncommitted_object_is_adopted_or_replaced_if_it_does_not_decode(
    objects: LocalObjects,
) -> None:
    plan = make_plan()
    create_store(objects, plan, {})
    other = make_shard(make_plan(seed=9), 0)
    write_shard(objects, plan, other)  # an attempt whose commit was never written
    record = write_shard(objects, plan, make_shard(plan, 0))
    adopted = record["statistics"][SITE]["ordinary"]["mean"]
    rows = other.activations[SITE].astype(np.float64)
    keep = other.norms[SITE] <= 5 * np.median(other.norms[SITE])
    assert np.allclose(adopted, rows[keep].mean(axis=0))
    key = layout.chunk_key(f"activations/{SITE}", 1)
    objects.publish(key, [b"not a shard"])
    write_shard(objects, plan, make_shard(plan, 1))
    assert (objects.size(key) or 0) > 1000


def test_another_plan_is_refused_naming_the_fields(objects: LocalObjects) -> None:
    make_store(objects)
    with pytest.raises(PlanMismatchError, match="seed: 0 → 3"):
        create_store(objects, make_plan(seed=3), {})


def test_a_folder_that_is_no_store_is_refused_and_left_alone(tmp_path: Path) -> None:
    with pytest.raises(NotAStoreError, match="holds no activation store"):
        ActivationStore.open(tmp_path)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(NotAStoreError, match=r"notes\.txt"):
        create_store(LocalObjects(tmp_path), make_plan(), {})
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]


def test_a_record_of_another_kind_is_no_plan(objects: LocalObjects) -> None:
    plan = make_store(objects)
    whole = objects.read(layout.PLAN_KEY)
    for key in (layout.seal_key(13), layout.commit_key(0)):
        objects.replace(layout.PLAN_KEY, [objects.read(key)])
        with pytest.raises(DamagedError, match=r"plan\.json is damaged"):
            ActivationStore.open(objects.place)
    objects.replace(layout.PLAN_KEY, [whole])
    assert read_plan(objects) == plan


def test_records_notice_any_change() -> None:
    record = {"a": [1.5, 2], "b": "text"}
    data = encode_record(record)
    assert decode_record(data, "r") == record
    for position in range(len(data)):
        for bit in range(8):
            changed = bytearray(data)
            changed[position] ^= 1 << bit
            with pytest.raises(DamagedError):
                decode_record(bytes(changed), "r")
    for other in (b"", b"[]", b"1", b'{"xxh3": NaN}', b'{"a": NaN, "xxh3": ""}', b"\xff"):
        with pytest.raises(DamagedError):
            decode_record(other, "r")


def test_a_shard_without_activations_is_not_written(objects: LocalObjects) -> None:
    plan = make_plan()
    create_store(objects, plan, {})
    shard = replace(make_shard(plan, 3), activations={}, norms={})
    with pytest.raises(ValueError, match=f"^Shard 3 has no activations at {SITE}.$"):
        write_shard(objects, plan, shard)
    assert objects.keys("tokens/") == []


def test_outlier_rows_and_held_out_documents_are_left_out_by_rule(objects: LocalObjects) -> None:
    make_store(objects)
    store = ActivationStore.open(objects.place)
    is_first = np.arange(store.n_rows) % 16 == 0  # synthetic rows: position 0 is 100 times larger
    kept = store.selected(SITE, RowRule(split="all"))
    assert not kept[is_first].any()
    assert kept[~is_first].mean() > 0.99
    everything = store.selected(SITE, RowRule(split="all", max_norm_medians=None))
    assert everything.all()
    train = store.selected(SITE, RowRule(max_norm_medians=None, heldout_fraction=0.3))
    held_out = store.selected(
        SITE, RowRule(max_norm_medians=None, heldout_fraction=0.3, split="heldout")
    )
    assert np.array_equal(train, ~held_out)
    by_context = held_out.reshape(-1, 16)  # each context is one document here
    assert np.array_equal(by_context.any(1), by_context.all(1))
    assert 0.1 < held_out.mean() < 0.5


def test_an_earlier_seal_stays_a_store_of_its_own(objects: LocalObjects) -> None:
    plan = make_store(objects, n_contexts=32)
    before = ActivationStore.open(objects.place)
    statistics = before.statistics(SITE)["all"]
    make_store(objects, plan)
    after = ActivationStore.open(objects.place)
    assert (before.n_rows, after.n_rows) == (512, 1600)
    again = ActivationStore.open(objects.place, before.digest)
    assert again.n_rows == 512
    assert np.array_equal(again.read(SITE, 0, 512), after.read(SITE, 0, 512))
    assert np.array_equal(again.statistics(SITE)["all"].mean, statistics.mean)
    with pytest.raises(ValueError, match="outside"):
        again.read(SITE, 0, 513)
    with pytest.raises(UnfinishedError, match=f"never sealed with the digest {digest_of(1)}"):
        ActivationStore.open(objects.place, digest_of(1))


class TestLocalObjects:
    def test_the_first_to_publish_wins_whole(self, objects: LocalObjects) -> None:
        offers = [bytes([number]) * 100_000 for number in range(16)]
        with_barrier = threading.Barrier(len(offers))
        results: list[bool] = []

        def offer(data: bytes) -> None:
            with_barrier.wait()
            results.append(objects.publish("a/b", [data[:500], memoryview(data)[500:]]))

        threads = [threading.Thread(target=offer, args=(data,)) for data in offers]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(results) == [False] * 15 + [True]
        assert objects.read("a/b") in offers
        assert objects.keys("") == ["a/b"]
        assert objects.leftovers() == []

    def test_keys_ranges_and_sizes(self, objects: LocalObjects) -> None:
        assert objects.keys("") == []
        assert objects.first_key() is None
        for key in ("commits/2", "commits/10", "other/c.1.0", "top"):
            assert objects.publish(key, [b"0123456789"])
        assert objects.keys("commits/") == ["commits/10", "commits/2"]
        assert objects.keys("commits/1") == ["commits/10"]
        assert len(objects.keys("")) == 4
        assert bytes(objects.read_range("top", 3, 4)) == b"3456"
        assert bytes(objects.read_range("top", 8, 100)) == b"89"
        assert bytes(objects.read_range("top", 50, 5)) == b""
        assert (objects.size("top"), objects.size("none"), objects.size("top/x")) == (
            10,
            None,
            None,
        )
        for missing in ("none", "top/x", "none/x"):
            with pytest.raises(FileNotFoundError):
                objects.read(missing)
            with pytest.raises(FileNotFoundError):
                objects.read_range(missing, 0, 1)
            if missing != "top/x":
                objects.remove(missing)
        objects.replace("top", [b"new"])
        assert objects.read("top") == b"new"
        objects.remove("top")
        assert objects.size("top") is None

    def test_more_pieces_than_one_call_takes_and_none(self, objects: LocalObjects) -> None:
        pieces = [bytes([number % 251]) * (number % 7) for number in range(3000)]
        objects.publish("many", pieces)
        assert objects.read("many") == b"".join(pieces)
        objects.publish("none", [])
        assert objects.read("none") == b""

    def test_temporary_files_of_the_living_are_no_leftovers(
        self, objects: LocalObjects, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        seen: list[tuple[int, list[str]]] = []
        fsync = os.fsync

        def look(descriptor: int) -> None:
            there = list(Path(objects.place).rglob(".*.tmp"))
            seen.append((len(there), objects.leftovers()))
            fsync(descriptor)

        monkeypatch.setattr(os, "fsync", look)
        objects.publish("a", [b"1"])
        assert (1, []) in seen
        monkeypatch.undo()
        torn = Path(objects.place) / "commits" / ".000000.json.1-a.tmp"
        torn.parent.mkdir()
        torn.write_bytes(b"{")
        assert objects.leftovers() == ["commits/.000000.json.1-a.tmp"]
        assert objects.keys("") == ["a"]

    def test_sealing_sweeps_up_what_killed_writers_left(self, objects: LocalObjects) -> None:
        plan = make_plan()
        create_store(objects, plan, {})
        torn = Path(objects.place) / "commits" / ".000000.json.1-a.tmp"
        torn.parent.mkdir()
        torn.write_bytes(b"{")
        assert verify(objects, no_progress).leftovers == ["commits/.000000.json.1-a.tmp"]
        make_store(objects, plan)
        assert not torn.exists()

    def test_a_folder_that_cannot_be_read_is_not_an_empty_one(
        self, objects: LocalObjects, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        make_store(objects)

        def refuse(folder: str) -> NoReturn:
            raise OSError(errno.EIO, os.strerror(errno.EIO), folder)

        monkeypatch.setattr(os, "scandir", refuse)  # by which os.walk looks
        with pytest.raises(StoreError, match=r"Cannot read .*/commits.* of .*: Input/output"):
            objects.keys("commits/")
        with pytest.raises(StoreError, match="Input/output error"):
            create_store(objects, make_plan(), {})

    def test_a_place_of_another_kind_is_refused(self) -> None:
        with pytest.raises(InputError, match="not at gs://"):
            open_objects("gs://bucket/store")


def test_what_a_store_has_read_goes_with_it(tiny_store: Path) -> None:
    store = ActivationStore.open(tiny_store)
    tables = [store.documents(0), store.pieces(0)]
    gone = [weakref.ref(held) for held in (store, *tables)]
    assert store.documents(0) is tables[0]  # read once
    del store, tables
    gc.collect()
    assert [held() for held in gone] == [None] * 3
