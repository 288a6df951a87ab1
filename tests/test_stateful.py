"""Any sequence of writing, dying, failing, damage, repair and growth, against a simple model.

The model knows which shards are committed, which counts are sealed and which objects are damaged;
what every row must be follows from the plan. Hypothesis looks for a sequence that surprises it.
"""

from __future__ import annotations

import shutil
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    precondition,
    rule,
    run_state_machine_as_test,
)

from sae_harvest.common.errors import DamagedError, SaeHarvestError, StoreError
from sae_harvest.store import layout
from sae_harvest.store.commits import commit_shard
from sae_harvest.store.maintenance.repair import mend_commit, remove_damaged, reseal, restore_plan
from sae_harvest.store.maintenance.verify import verify
from sae_harvest.store.objects import LocalObjects
from sae_harvest.store.reader import ActivationStore
from sae_harvest.store.seals import seal
from sae_harvest.store.writer import create_store, write_shard
from tests.faulty_disk import CODES, FaultyDisk, Killed, faulty, sentence_of
from tests.synthetic import SITE, make_plan, make_shard, make_store

CONTEXTS = 44  # 5 shards of 8 contexts and one of 4
SHARDS = 6

shards = st.integers(0, SHARDS - 1)
calls = st.integers(1, 70)


@cache
def expected(dtype: str, n_shards: int) -> tuple[str, np.ndarray]:
    """Digest and rows of an undisturbed store."""
    with tempfile.TemporaryDirectory() as place:
        make_store(Path(place), make_plan(dtype=dtype), min(CONTEXTS, 8 * n_shards))
        store = ActivationStore.open(place)
        return store.digest, store.read(SITE, 0, store.n_rows)


class StoreMachine(RuleBasedStateMachine):
    """One store and what is known about it."""

    dtype = "float16"

    def __init__(self) -> None:
        super().__init__()
        self.place = Path(tempfile.mkdtemp(prefix="stateful-"))
        self.objects = LocalObjects(self.place / "store")
        self.plan = make_plan(dtype=self.dtype)
        self.committed: set[int] = set()
        self.sealed: set[int] = set()
        self.damaged: set[str] = set()

    def teardown(self) -> None:
        shutil.rmtree(self.place)

    @initialize()
    def create(self) -> None:
        create_store(self.objects, self.plan, {})

    # What a harvest does.

    def _write(self, shard: int) -> None:
        create_store(self.objects, self.plan, {})
        record = write_shard(self.objects, self.plan, make_shard(self.plan, shard, CONTEXTS))
        commit_shard(self.objects, record)

    @precondition(lambda self: layout.PLAN_KEY not in self.damaged)
    @rule(shard=shards)
    def write(self, shard: int) -> None:
        """A worker makes a shard, for the first time or again, because it does not know better."""
        record = layout.commit_key(shard)
        if record in self.damaged and self.objects.size(record) is not None:
            with pytest.raises(DamagedError, match=record):
                self._write(shard)
        else:
            self._write(shard)
            self.committed.add(shard)
        self._forget(shard)

    @precondition(lambda self: layout.PLAN_KEY not in self.damaged)
    @rule(shard=shards, call=calls, function=st.sampled_from(("any", "writev", "link")))
    def die(self, shard: int, call: int, function: str) -> None:
        self._disturbed(shard, FaultyDisk(function, call))

    @precondition(lambda self: layout.PLAN_KEY not in self.damaged)
    @rule(shard=shards, call=calls, code=st.sampled_from(CODES), for_good=st.booleans())
    def fail(self, shard: int, call: int, code: int, for_good: bool) -> None:
        self._disturbed(shard, FaultyDisk("any", call, code, for_good))

    def _disturbed(self, shard: int, disk: FaultyDisk) -> None:
        try:
            with faulty(disk):
                self._write(shard)
        except Killed:
            pass
        except SaeHarvestError as error:
            sentence_of(error)
        if self.objects.size(layout.commit_key(shard)) is not None:
            self.committed.add(shard)
        self._forget(shard)

    def _forget(self, shard: int) -> None:
        """Writing may have put whole objects in the place of damaged ones of the shard."""
        whole = expected_objects(self.dtype)
        for key in self.damaged & {layout.commit_key(shard), *objects_of(self.dtype, shard)}:
            if self.objects.size(key) is not None and self.objects.read(key) == whole[key]:
                self.damaged.discard(key)

    @precondition(lambda self: layout.PLAN_KEY not in self.damaged)
    @rule(n_shards=st.integers(1, SHARDS), call=st.none() | calls)
    def seal(self, n_shards: int, call: int | None) -> None:
        """Reach a target, larger or smaller than others, perhaps dying at it."""
        try:
            with faulty(FaultyDisk("any", call or 0)):
                assert seal(self.objects, self.plan, n_shards)["digest"] == self._digest(n_shards)
        except Killed:
            if self.objects.size(layout.seal_key(n_shards)) is not None:
                self.sealed.add(n_shards)
        except DamagedError:
            missing = set(range(n_shards)) - self.committed
            records = {layout.commit_key(u) for u in range(n_shards)} | {
                layout.seal_key(max(self.sealed | {n_shards})),
                layout.seal_key(n_shards),
            }
            assert missing or records & self.damaged
        else:
            assert set(range(n_shards)) <= self.committed
            self.sealed.add(n_shards)
        self.damaged = {key for key in self.damaged if not self._is_current(key)}

    def _is_current(self, key: str) -> bool:
        """Sealing brings zarr.json up to date."""
        if not key.endswith("zarr.json"):
            return False
        return key not in {item.key for item in self._verify()}

    def _digest(self, n_shards: int) -> str:
        return expected(self.dtype, n_shards)[0]

    # What disks and people do.

    @precondition(lambda self: self.sealed)
    @rule(data=st.data(), how=st.sampled_from(("flip", "flip", "cut", "delete")))
    def damage(self, data: st.DataObject, how: str) -> None:
        """Something that is covered by the latest seal is altered, cut short or gone."""
        keys = [layout.PLAN_KEY, layout.seal_key(max(self.sealed))]
        keys += [key for key in self.objects.keys("") if key.endswith("zarr.json")]
        for shard in range(max(self.sealed)):
            # Without the record, what a flipped bit in a table did not change cannot be told.
            if not self.damaged & set(objects_of(self.dtype, shard)):
                keys += [layout.commit_key(shard), *objects_of(self.dtype, shard)]
        whole = [k for k in keys if k not in self.damaged and self.objects.size(k)]
        if not whole or layout.PLAN_KEY in self.damaged:
            return
        key = data.draw(st.sampled_from(sorted(whole)))
        path = self.place / "store" / key
        content = bytearray(path.read_bytes())
        if how == "flip":
            content[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(
                st.integers(0, 7)
            )
            path.write_bytes(content)
        elif how == "cut":
            path.write_bytes(content[: data.draw(st.integers(0, len(content) - 1))])
        elif not key.startswith("seals/"):  # a seal that is gone is a store not sealed yet
            path.unlink()
        else:
            return
        self.damaged.add(key)

    def _verify(self) -> list[Any]:
        return verify(self.objects, lambda done, total: None).damage

    @rule()
    def check(self) -> None:
        if layout.PLAN_KEY in self.damaged:
            with pytest.raises(SaeHarvestError, match=r"plan\.json"):
                self._verify()
            return
        hidden = {  # known to be damaged through their commit record, which is damaged itself
            key
            for shard in range(SHARDS)
            if layout.commit_key(shard) in self.damaged
            for key in objects_of(self.dtype, shard)
        }
        if self.sealed and layout.seal_key(max(self.sealed)) in self.damaged:
            hidden |= {key for key in self.damaged if key.endswith("zarr.json")}
        found = {item.key for item in self._verify()}
        assert found == self.damaged - hidden

    @rule(call=st.none() | calls)
    def repair(self, call: int | None) -> None:
        """As `harvest verify --repair` does, which may be killed as well."""
        try:
            with faulty(FaultyDisk("any", call or 0)):
                restore_plan(self.objects)
                damage = self._verify()
                remove_damaged(self.objects, damage)
                for shard in sorted({item.shard for item in damage if item.shard is not None}):
                    made = make_shard(self.plan, shard, CONTEXTS)
                    record = write_shard(self.objects, self.plan, made)
                    mend_commit(self.objects, self.plan, record)
                reseal(self.objects, self.plan)
        except Killed:
            self._look_again()
        else:
            assert self._verify() == []
            self.damaged = set()
        for n_shards in self.sealed if not self.damaged else ():
            assert ActivationStore.open(self.objects.place, self._digest(n_shards))

    def _look_again(self) -> None:
        """What a repair that was killed has left, told by what the objects should be."""
        whole = expected_objects(self.dtype)
        for key in set(self.damaged):
            if self.objects.size(key) is None:
                continue
            data = self.objects.read(key)
            if key in whole:
                mended = data == whole[key]
            elif key == layout.PLAN_KEY:
                mended = readable(lambda: restore_plan(self.objects))
            elif key.startswith("seals/"):
                mended = readable(lambda: ActivationStore.open(self.objects.place))
            else:
                mended = key not in {item.key for item in self._verify()}
            if mended:
                self.damaged.discard(key)

    # What readers see.

    @precondition(lambda self: self.sealed)
    @rule(data=st.data(), latest=st.booleans())
    def read(self, data: st.DataObject, latest: bool) -> None:
        n_shards = max(self.sealed) if latest else data.draw(st.sampled_from(sorted(self.sealed)))
        digest, rows = expected(self.dtype, n_shards)
        start = data.draw(st.integers(0, len(rows)))
        stop = data.draw(st.integers(start, len(rows)))
        try:
            store = ActivationStore.open(self.objects.place, None if latest else digest)
            found = store.read(SITE, start, stop)
            tokens = store.tokens(0, store.n_contexts)
        except SaeHarvestError:
            assert self.damaged
            return
        assert store.digest == digest
        assert found.dtype == rows.dtype
        assert np.array_equal(found, rows[start:stop])
        assert np.array_equal(tokens.reshape(-1), np.arange(len(rows)))

    @precondition(lambda self: not self.sealed)
    @rule()
    def read_unsealed(self) -> None:
        with pytest.raises(StoreError, match="none is sealed"):
            ActivationStore.open(self.objects.place)


def readable(look: Any) -> bool:
    try:
        look()
    except SaeHarvestError:
        return False
    return True


@cache
def expected_objects(dtype: str) -> dict[str, bytes]:
    """Key → bytes of every object of the shards, and of their commit records."""
    with tempfile.TemporaryDirectory() as place:
        make_store(Path(place), make_plan(dtype=dtype), CONTEXTS)
        objects = LocalObjects(Path(place))
        kinds = ("tokens", "activations", "norms", "quantization", "exact", "contexts", "documents")
        return {
            key: objects.read(key)
            for kind in (*kinds, "commits")
            for key in objects.keys(f"{kind}/")
            if not key.endswith("zarr.json")
        }


def objects_of(dtype: str, shard: int) -> list[str]:
    """Keys of the objects that the commit record of a shard lists."""
    names = f"c.{shard}", f"c.{shard}.0", f"c.{shard}.0.0", f"{shard:06d}.parquet"
    return [key for key in expected_objects(dtype) if key.rpartition("/")[2] in names]


class QuantizedStoreMachine(StoreMachine):
    dtype = "int8"


@pytest.mark.slow
@pytest.mark.parametrize(("machine", "examples"), [(StoreMachine, 30), (QuantizedStoreMachine, 15)])
def test_nothing_that_can_happen_to_a_store_makes_it_lose_or_lie(
    machine: type[RuleBasedStateMachine],
    examples: int,
    unflushed: None,
    in_turn: None,
) -> None:
    run_state_machine_as_test(  # type: ignore[no-untyped-call]
        machine,
        settings=settings(
            max_examples=examples,
            stateful_step_count=30,
            deadline=None,
            phases=[Phase.generate],  # shrinking takes minutes; add it to look into a failure
            suppress_health_check=list(HealthCheck),
        ),
    )
