"""Faults of the disk at every single call, processes that die there, and writers that come late.

Whatever happens, the store afterwards is the one that an undisturbed run makes, or what was asked
is refused in one sentence; no row is ever wrong.
"""

from __future__ import annotations

import errno
import random
import shutil
from pathlib import Path

import numpy as np
import pytest

from sae_harvest.common.errors import StoreError
from sae_harvest.store import layout
from sae_harvest.store.commits import commit_shard
from sae_harvest.store.layout import Plan
from sae_harvest.store.maintenance.verify import verify
from sae_harvest.store.objects import LocalObjects
from sae_harvest.store.reader import ActivationStore
from sae_harvest.store.seals import seal
from sae_harvest.store.writer import Shard, create_store, write_shard
from tests.faulty_disk import CODES, WRITING, FaultyDisk, Killed, faulty
from tests.synthetic import SITE, make_plan, make_shard, make_store

SHORT = 20  # contexts: 3 shards, the last one short

pytestmark = pytest.mark.usefixtures("unflushed")


def assert_whole(place: Path, digest: str) -> None:
    """The store is sealed with this digest, every byte as committed, nothing left lying about."""
    report = verify(LocalObjects(place), lambda done, total: None)
    assert (report.digest, report.damage, report.leftovers) == (digest, [], [])
    assert ActivationStore.open(place).digest == digest


def assert_nothing_wrong(place: Path) -> None:
    """What is committed and sealed so far is as it should be; the rest does not count."""
    if (place / layout.PLAN_KEY).exists():
        assert verify(LocalObjects(place), lambda done, total: None).damage == []


@pytest.fixture(scope="module")
def digests(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """dtype → digest of the synthetic store of SHORT contexts."""
    found = {}
    for dtype in ("float16", "int8"):
        place = tmp_path_factory.mktemp("undisturbed") / "store"
        make_store(place, make_plan(dtype=dtype), SHORT)
        found[dtype] = ActivationStore.open(place).digest
    return found


def calls_of(place: Path, plan: Plan, function: str) -> int:
    with faulty(FaultyDisk(function, 0)) as disk:
        make_store(place, plan, SHORT)
    return disk.count


@pytest.mark.slow
@pytest.mark.usefixtures("in_turn")
@pytest.mark.parametrize("function", WRITING)
def test_a_fault_at_any_call_is_one_sentence_and_continuing_gives_the_same_store(
    tmp_path: Path, digests: dict[str, str], function: str
) -> None:
    plan = make_plan()
    count = calls_of(tmp_path / "healthy", plan, function)
    assert count >= 6
    for nth in range(1, count + 1):
        code = CODES[nth % 2]
        sentence = "No space " if code == errno.ENOSPC else "Cannot write "
        place = tmp_path / f"{nth}"
        with (
            faulty(FaultyDisk(function, nth, code, for_good=nth % 3 == 0)),
            pytest.raises(StoreError, match=f"^{sentence}[^\n]*[.]$"),
        ):
            make_store(place, plan, SHORT)
        assert_nothing_wrong(place)
        assert verify_leftovers(place) == []
        make_store(place, plan, SHORT)
        assert_whole(place, digests["float16"])
        shutil.rmtree(place)


def verify_leftovers(place: Path) -> list[str]:
    return LocalObjects(place).leftovers() if place.exists() else []


@pytest.mark.slow
@pytest.mark.usefixtures("in_turn")
@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_a_process_that_dies_at_any_call_leaves_a_store_that_is_continued(
    tmp_path: Path, digests: dict[str, str], dtype: str
) -> None:
    plan = make_plan(dtype=dtype)
    count = calls_of(tmp_path / "healthy", plan, "any")
    for nth in range(1, count + 1, 2 if dtype == "float16" else 5):
        place = tmp_path / f"{nth}"
        with faulty(FaultyDisk("any", nth)), pytest.raises(Killed):
            make_store(place, plan, SHORT)
        assert_nothing_wrong(place)
        make_store(place, plan, SHORT)
        assert_whole(place, digests[dtype])
        shutil.rmtree(place)


@pytest.mark.slow
@pytest.mark.usefixtures("in_turn")
def test_a_process_that_dies_while_a_store_grows_leaves_the_smaller_store(
    tmp_path: Path, digests: dict[str, str]
) -> None:
    plan = make_plan()
    make_store(tmp_path / "small", plan, 16)
    smaller = ActivationStore.open(tmp_path / "small").digest
    with faulty(FaultyDisk("any", 0)) as disk:
        make_store(Path(shutil.copytree(tmp_path / "small", tmp_path / "grown")), plan, SHORT)
    for nth in range(1, disk.count + 1, 2):
        place = Path(shutil.copytree(tmp_path / "small", tmp_path / f"{nth}"))
        with faulty(FaultyDisk("any", nth)), pytest.raises(Killed):
            make_store(place, plan, SHORT)
        assert_nothing_wrong(place)
        found = ActivationStore.open(place)
        assert found.digest in (smaller, digests["float16"])
        assert np.isfinite(found.read(SITE, 0, found.n_rows)).all()
        assert ActivationStore.open(place, smaller).n_rows == 256
        make_store(place, plan, SHORT)
        assert_whole(place, digests["float16"])
        shutil.rmtree(place)


@pytest.mark.parametrize("dtype", ["float16", "int8"])
@pytest.mark.parametrize("length", [0, 11])
def test_an_object_cut_by_a_power_failure_before_its_commit_is_never_adopted(
    tmp_path: Path, digests: dict[str, str], length: int, dtype: str
) -> None:
    plan = make_plan(dtype=dtype)
    place = tmp_path / "store"
    make_store(place, plan, SHORT)
    objects = LocalObjects(place)
    keys = [key for key in objects.keys("") if "c.1" in key or "000001.parquet" in key]
    assert len(keys) == (5 if dtype == "float16" else 7)
    for key in keys:
        objects.remove(layout.commit_key(1))
        objects.remove(layout.seal_key(3))
        whole = objects.read(key)
        for damaged in (whole[:length], whole[:-1], bytes(len(whole)), whole[:-3] + b"\1\1\1"):
            (place / key).write_bytes(damaged)
            make_store(place, plan, SHORT)
            assert_whole(place, digests[dtype])
            objects.remove(layout.commit_key(1))
            objects.remove(layout.seal_key(3))


def test_an_object_of_an_attempt_that_was_killed_is_adopted_as_it_is(
    tmp_path: Path, digests: dict[str, str]
) -> None:
    place, plan = tmp_path / "store", make_plan()
    objects = LocalObjects(place)
    create_store(objects, plan, {})
    for number in range(3):
        write_shard(objects, plan, make_shard(plan, number, SHORT))
    before = {key: (place / key).stat().st_ino for key in objects.keys("") if "c." in key}
    assert len(before) == 9
    make_store(place, plan, SHORT)
    assert {key: (place / key).stat().st_ino for key in before} == before
    assert_whole(place, digests["float16"])


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_a_zombie_that_finishes_late_changes_nothing_and_mixes_nothing_up(
    tmp_path: Path, dtype: str
) -> None:
    plan = make_plan(dtype=dtype)
    attempts = [make_shard(plan, 1, SHORT), make_shard(plan, 1, SHORT, noise=0.01)]
    alone = [rows_alone(tmp_path / f"alone-{i}", plan, shard) for i, shard in enumerate(attempts)]
    assert not np.array_equal(*alone)
    create_store(LocalObjects(tmp_path / "count"), plan, {})
    with faulty(FaultyDisk("any", 0)) as disk:
        write_shard(LocalObjects(tmp_path / "count"), plan, attempts[0])
    rng = random.Random(0)
    for nth in range(1, disk.count + 1, 1 if dtype == "float16" else 3):
        place = tmp_path / f"{nth}"
        objects = LocalObjects(place)
        create_store(objects, plan, {})
        with faulty(FaultyDisk("any", nth)), pytest.raises(Killed):
            write_shard(objects, plan, attempts[0])  # is stopped for a while
        record = commit_shard(objects, write_shard(objects, plan, attempts[1]))
        for number in (0, 2):
            commit_shard(objects, write_shard(objects, plan, make_shard(plan, number, SHORT)))
        digest = seal(objects, plan, 3)["digest"]
        late = rng.choice(attempts)  # and goes on after everything else
        assert commit_shard(objects, write_shard(objects, plan, late)) == record
        assert_whole(place, digest)
        store = ActivationStore.open(place)
        read = store.read(SITE, *store.shard_span(1))
        if dtype == "float16":
            assert any(np.array_equal(read, rows) for rows in alone)
        else:  # codes of one attempt may be made with the scale of the other
            near = [np.isclose(read, rows, rtol=0.02, atol=0.1).all(axis=1) for rows in alone]
            assert (near[0] | near[1]).all()
        norms = store.norms(SITE, *store.shard_span(1))
        assert any(np.array_equal(norms, shard.norms[SITE]) for shard in attempts)
        shutil.rmtree(place)


def rows_alone(place: Path, plan: Plan, shard: Shard) -> np.ndarray:
    """What a reader gets if this attempt is the only one."""
    objects = LocalObjects(place)
    create_store(objects, plan, {})
    for number in range(3):
        made = shard if number == shard.number else make_shard(plan, number, SHORT)
        commit_shard(objects, write_shard(objects, plan, made))
    seal(objects, plan, 3)
    store = ActivationStore.open(place)
    return store.read(SITE, *store.shard_span(shard.number))
