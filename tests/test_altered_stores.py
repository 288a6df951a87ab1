"""Stores altered at random, with checksums that fit: no wrong row, no file touched elsewhere.

Whatever names, numbers and records say, a command ends in its result or in one sentence.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, Phase, given, note, settings

from sae_harvest.common.errors import DamagedError, SaeHarvestError
from sae_harvest.harvest.inspect.export import ExportConfig, export
from sae_harvest.harvest.inspect.show import describe
from sae_harvest.harvest.run.status import describe_status
from sae_harvest.store import layout
from sae_harvest.store.commits import commit_shard, read_plan
from sae_harvest.store.loading.loader import ShuffledLoader
from sae_harvest.store.maintenance.merge import merge
from sae_harvest.store.maintenance.repair import (
    mend_commit,
    remove_damaged,
    remove_untrusted,
    reseal,
    restore_plan,
)
from sae_harvest.store.maintenance.verify import verify
from sae_harvest.store.objects import LocalObjects
from sae_harvest.store.reader import ActivationStore
from sae_harvest.store.records import digest_of, encode_record
from sae_harvest.store.rules import RowRule
from sae_harvest.store.seals import seal, trusted_commits
from sae_harvest.store.writer import create_store, write_shard
from tests.altered_stores import KINDS, Alteration, Altered, apply
from tests.faulty_disk import sentence_of
from tests.synthetic import SITE, make_plan, make_shard, make_store
from tests.test_bits import READINGS, same

pytestmark = pytest.mark.usefixtures("unflushed", "small_chunks")

CONTEXTS = 20  # 3 shards of 4 chunks, the last one short; sealed with 2 and with 3
ALL = RowRule(split="all", max_norm_medians=None)
DTYPES = ("float16", "int8")


@dataclass(frozen=True)
class Original:
    """A store, one of the same plan with other rows, and what is read of both, by digest."""

    root: Path
    foreign: Path
    readings: dict[str, dict[str, Any]]


@pytest.fixture(scope="module")
def small_chunks() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layout, "MAX_CHUNK_ROWS", 32)
        yield


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory, small_chunks: None) -> dict[str, Original]:
    found = {}
    for dtype in DTYPES:
        folder, plan = tmp_path_factory.mktemp(dtype), make_plan(dtype=dtype)
        readings = {}
        for n_contexts in (16, CONTEXTS):
            make_store(folder / "store", plan, n_contexts)
            store = ActivationStore.open(folder / "store")
            readings[store.digest] = {name: read(store) for name, read in READINGS.items()}
        (folder / "store" / layout.STATUS_KEY).write_bytes(encode_record({"pid": 1}))
        foreign = LocalObjects(folder / "foreign")
        create_store(foreign, plan, {})
        for shard in range(3):
            made = make_shard(plan, shard, CONTEXTS, noise=0.01)
            commit_shard(foreign, write_shard(foreign, plan, made))
        for n_shards in (2, 3):
            seal(foreign, plan, n_shards)
            store = ActivationStore.open(foreign.place)
            readings[store.digest] = {name: read(store) for name, read in READINGS.items()}
        found[dtype] = Original(folder / "store", folder / "foreign", readings)
    return found


def read(altered: Altered, original: Original) -> None:
    store = ActivationStore.open(altered.root)
    truth = original.readings.get(store.digest)
    assert truth is not None or altered.forged, "another digest without a forged one"
    for name, reading in READINGS.items():
        try:
            value = reading(store)
        except SaeHarvestError as error:
            sentence_of(error)
            continue
        assert truth is None or same(value, truth[name]), name


def load(altered: Altered, original: Original) -> None:
    store = ActivationStore.open(altered.root)
    truth = original.readings.get(store.digest)
    loader = ShuffledLoader(store, SITE, 32, 0, ALL, window_chunks=3)
    try:
        for _ in range(loader.batches_per_epoch):
            batch = loader.next_batch()
            if truth is not None:
                expected = truth["rows"][batch.rows].astype(np.float32)
                assert np.array_equal(batch.x.numpy(), expected)
    finally:
        loader.close()


def check(altered: Altered, original: Original) -> None:
    report = verify(LocalObjects(altered.root), lambda done, total: None)
    for item in report.damage:
        assert "\n" not in item.sentence
    if report.digest is not None:
        assert report.digest in original.readings or altered.forged
        read(altered, original)


def repair(altered: Altered, original: Original) -> None:
    """As `harvest verify --repair` does, with a model that is always at hand."""
    objects = LocalObjects(altered.root)
    restore_plan(objects)
    mend(objects)
    report = verify(objects, lambda done, total: None)
    assert report.damage == []
    if not altered.forged:
        assert report.digest is None or report.digest in original.readings
    read(altered, original)


def mend(objects: LocalObjects) -> None:
    plan = read_plan(objects)
    damage = verify(objects, lambda done, total: None).damage
    sealed = trusted_commits(objects, plan)
    remove_damaged(objects, damage)
    made: dict[int, str] = {}

    def make(shard: int) -> None:
        if shard * plan.contexts_per_shard >= CONTEXTS:
            raise DamagedError("The corpus ends before this shard.")
        record = write_shard(objects, plan, make_shard(plan, shard, CONTEXTS))
        mend_commit(objects, plan, record)
        made[shard] = digest_of(record)

    for shard in sorted({item.shard for item in damage if item.shard is not None}):
        make(shard)
    unknown = {item.shard for item in damage if item.key.startswith("commits/")}
    for shard in remove_untrusted(
        objects, plan, {u: d for u, d in made.items() if u in unknown}, sealed
    ):
        make(shard)
    reseal(objects, plan)
    if any(item.key == layout.STATUS_KEY for item in damage):
        objects.remove(layout.STATUS_KEY)


def export_rows(altered: Altered, original: Original) -> None:
    out = altered.root.parent / "out"
    export(altered.root, out, ExportConfig(format="parquet"))
    truth = original.readings.get(ActivationStore.open(altered.root).digest)
    if truth is not None:
        table = pq.read_table(out / SITE)
        flat = table["activation"].combine_chunks().flatten().to_numpy()
        expected = truth["rows"][table["row"].to_numpy()]
        assert np.array_equal(flat.reshape(-1, 8), expected)


def join(altered: Altered, original: Original) -> None:
    target = LocalObjects(altered.root.parent / "merged")
    merged = merge(target, [LocalObjects(altered.root)], lambda done, total: None)
    if merged.digest is not None and merged.digest in original.readings:
        found = ActivationStore.open(target.place)
        assert same(found.read(SITE, 0, found.n_rows), original.readings[merged.digest]["rows"])


def grow(altered: Altered, original: Original) -> None:
    """As `harvest run` does: what is there is adopted, what lacks is made, and it is sealed."""
    objects = LocalObjects(altered.root)
    make_store(objects, read_plan(objects), CONTEXTS)
    read(altered, original)


def tell(altered: Altered, original: Original) -> None:
    describe_status(LocalObjects(altered.root))
    describe(altered.root)


USES: dict[str, Callable[[Altered, Original], None]] = {
    function.__name__: function
    for function in (read, load, check, repair, export_rows, join, grow, tell)
}

numbers = st.integers(0, 9999)
alterations = st.lists(
    st.builds(Alteration, st.sampled_from(sorted(KINDS)), numbers, numbers, numbers),
    min_size=1,
    max_size=3,
)


def state_of(folder: Path) -> dict[str, Any]:
    """Everything in a folder and below, links not followed: what it is, and its content."""
    found: dict[str, Any] = {}
    for place, folders, names in os.walk(folder):
        for name in (*folders, *names):
            path = Path(place, name)
            key = path.relative_to(folder).as_posix()
            if path.is_symlink():
                found[key] = path.readlink()
            elif path.is_file():
                found[key] = path.read_bytes()
            else:
                found[key] = path.stat().st_mode
    return found


@pytest.mark.slow
@settings(
    max_examples=500,
    deadline=None,
    phases=[Phase.generate],  # shrinking takes minutes; add it to look into a failure
    suppress_health_check=list(HealthCheck),
)
@given(dtype=st.sampled_from(DTYPES), done=alterations, use=st.sampled_from(sorted(USES)))
def test_an_altered_store_is_refused_or_read_as_it_was(
    tmp_path_factory: pytest.TempPathFactory,
    originals: dict[str, Original],
    dtype: str,
    done: list[Alteration],
    use: str,
) -> None:
    original = originals[dtype]
    case = tmp_path_factory.getbasetemp() / "altered"
    shutil.rmtree(case, ignore_errors=True)
    (case / "outside").mkdir(parents=True)
    (case / "outside" / "mine.txt").write_text("mine")
    shutil.copytree(original.root, case / "store")
    altered = Altered(case / "store", case / "outside", original.foreign)
    for alteration in done:
        apply(altered, alteration)
    note(f"{use} after {altered.told}")
    before = state_of(altered.outside)
    try:
        USES[use](altered, original)
    except SaeHarvestError as error:
        sentence_of(error)
        str(error).encode()
    assert state_of(altered.outside) == before
    assert {path.name for path in case.iterdir()} <= {"outside", "store", "out", "merged"}
