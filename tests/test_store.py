"""The store: what is written is read back, by us and by plain zarr; what is damaged is named."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from store.errors import DamagedError, NotAStoreError, PlanMismatchError, UnfinishedError
from store.objects import leftovers, publish
from store.reader import ActivationStore
from store.records import decode_record, encode_record
from store.rules import RowRule
from store.verify import verify
from store.writer import commit_shard, create_store, seal, write_shard
from tests.synthetic import SITE, make_plan, make_shard, make_store, rows_of


def no_progress(done: int, total: int) -> None:
    pass


def objects_of(root: Path) -> list[Path]:
    return sorted(p for p in root.rglob("*") if p.is_file())


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_rows_come_back_exactly(tmp_path: Path, dtype: str) -> None:
    plan = make_store(tmp_path / "s", make_plan(dtype=dtype))
    store = ActivationStore.open(tmp_path / "s")
    expected = rows_of(plan).astype(dtype)
    assert np.array_equal(store.read(SITE, 0, store.n_rows), expected)
    assert np.array_equal(store.read(SITE, 100, 901), expected[100:901])
    assert np.array_equal(store.tokens(7, 9), np.arange(7 * 16, 9 * 16).reshape(2, 16))
    assert np.allclose(store.norms(SITE, 0, 300), np.linalg.norm(rows_of(plan)[:300], axis=1))


def test_plain_zarr_and_dask_read_the_same_without_us(tmp_path: Path) -> None:
    plan = make_store(tmp_path / "s")
    script = f"""
import sys, numpy as np, zarr, dask.array
group = zarr.open_group({str(tmp_path / "s")!r}, mode="r")
x = group["activations/{SITE}"]
lazy = dask.array.from_zarr({str(tmp_path / "s")!r}, component="activations/{SITE}")
np.save({str(tmp_path / "x.npy")!r}, x[:])
np.save({str(tmp_path / "lazy.npy")!r}, lazy.compute())
assert group.attrs["context_length"] == 16 and group["tokens"].shape == ({plan.n_contexts}, 16)
assert not {{"store", "harvest", "train", "pipelines"}} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-I", "-c", script], check=True, cwd=tmp_path)
    ours = ActivationStore.open(tmp_path / "s").read(SITE, 0, plan.n_rows)
    assert np.array_equal(np.load(tmp_path / "x.npy"), ours)
    assert np.array_equal(np.load(tmp_path / "lazy.npy"), ours)


def test_every_flipped_bit_is_named_by_verify(tmp_path: Path) -> None:
    root = tmp_path / "s"
    make_store(root, make_plan(n_contexts=20))
    rng = np.random.default_rng(0)
    for path in objects_of(root):
        data = bytearray(path.read_bytes())
        position, bit = int(rng.integers(len(data))), int(rng.integers(8))
        data[position] ^= 1 << bit
        path.write_bytes(data)
        if path.name == "plan.json":
            with pytest.raises((DamagedError, NotAStoreError), match=r"plan\.json"):
                verify(root, no_progress)
        else:
            damage = verify(root, no_progress).damage
            assert damage, path
            assert all(str(path.relative_to(root)) in sentence for sentence in damage)
        data[position] ^= 1 << bit
        path.write_bytes(data)
    assert verify(root, no_progress).damage == []


def test_damaged_data_is_refused_by_the_reader(tmp_path: Path) -> None:
    root = tmp_path / "s"
    make_store(root)
    shard = root / f"activations/{SITE}/c/3/0"
    whole = shard.read_bytes()
    rows = (3 * 128, 4 * 128)
    rng = np.random.default_rng(1)
    for _ in range(40):
        data = bytearray(whole)
        data[int(rng.integers(len(data)))] ^= 1 << int(rng.integers(8))
        shard.write_bytes(data)
        with pytest.raises(DamagedError, match="c/3/0"):
            ActivationStore.open(root).read(SITE, *rows)
    shard.write_bytes(whole[:-10])
    with pytest.raises(DamagedError, match="c/3/0"):
        ActivationStore.open(root).read(SITE, *rows)
    shard.unlink()
    with pytest.raises(DamagedError, match="c/3/0 is missing"):
        ActivationStore.open(root).read(SITE, *rows)
    assert any("c/3/0 is missing" in s for s in verify(root, no_progress).damage)
    shard.write_bytes(whole)
    assert np.isfinite(ActivationStore.open(root).read(SITE, *rows)).all()


def test_a_shard_exists_only_with_its_commit(tmp_path: Path) -> None:
    root, plan = tmp_path / "s", make_plan()
    create_store(root, plan, {})
    for number in range(plan.n_shards - 1):
        commit_shard(root, write_shard(root, plan, make_shard(plan, number)))
    last = write_shard(root, plan, make_shard(plan, plan.n_shards - 1))
    with pytest.raises(UnfinishedError, match="12 of 13 shards"):
        ActivationStore.open(root)
    commit_shard(root, last)
    seal(root, plan)
    assert ActivationStore.open(root).n_rows == plan.n_rows


def test_digest_does_not_depend_on_order_or_repetition(tmp_path: Path) -> None:
    plan = make_store(tmp_path / "a")
    root = tmp_path / "b"
    create_store(root, plan, {"torch": "another version"})
    for number in [5, 5, *reversed(range(plan.n_shards))]:
        commit_shard(root, write_shard(root, plan, make_shard(plan, number)))
    assert seal(root, plan) == ActivationStore.open(tmp_path / "a").digest
    other = make_plan(seed=1)
    make_store(tmp_path / "c", other)
    assert ActivationStore.open(tmp_path / "c").digest != seal(root, plan)


def test_an_uncommitted_object_is_adopted_or_replaced_if_it_does_not_decode(
    tmp_path: Path,
) -> None:
    root, plan = tmp_path / "s", make_plan()
    create_store(root, plan, {})
    other = make_shard(make_plan(seed=9), 0)
    write_shard(root, plan, other)  # an attempt whose commit was never written
    record = write_shard(root, plan, make_shard(plan, 0))
    adopted = record["statistics"][SITE]["ordinary"]["mean"]
    rows = other.activations[SITE].astype(np.float64)
    keep = other.norms[SITE] <= 5 * np.median(other.norms[SITE])
    assert np.allclose(adopted, rows[keep].mean(axis=0))
    key = f"activations/{SITE}/c/1/0"
    publish(root, key, b"not a shard")
    write_shard(root, plan, make_shard(plan, 1))
    assert (root / key).stat().st_size > 1000


def test_another_plan_is_refused_naming_the_fields(tmp_path: Path) -> None:
    make_store(tmp_path / "s")
    with pytest.raises(PlanMismatchError, match="seed: 0 → 3"):
        create_store(tmp_path / "s", make_plan(seed=3), {})


def test_a_folder_that_is_no_store_is_refused_and_left_alone(tmp_path: Path) -> None:
    with pytest.raises(NotAStoreError, match="holds no activation store"):
        ActivationStore.open(tmp_path)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(NotAStoreError, match=r"notes\.txt"):
        create_store(tmp_path, make_plan(), {})
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]


def test_killed_writers_leave_nothing_that_counts(tmp_path: Path) -> None:
    root, plan = tmp_path / "s", make_plan()
    create_store(root, plan, {})
    (root / "commits").mkdir()
    torn = root / "commits" / ".000000.json.1-a.tmp"
    torn.write_bytes(b"{")
    assert leftovers(root) == [torn]
    for number in range(plan.n_shards):
        commit_shard(root, write_shard(root, plan, make_shard(plan, number)))
    seal(root, plan)
    assert leftovers(root) == []


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


def test_outlier_rows_and_held_out_documents_are_left_out_by_rule(tmp_path: Path) -> None:
    plan = make_store(tmp_path / "s")
    store = ActivationStore.open(tmp_path / "s")
    is_first = np.arange(plan.n_rows) % 16 == 0  # synthetic rows: position 0 is 100 times larger
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
