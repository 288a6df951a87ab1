"""Merging: the parts of a store become it, to the bit; nothing half-merged counts as whole."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

from sae_harvest.common.atomic import Buffer
from sae_harvest.common.errors import (
    DamagedError,
    InputError,
    NotAStoreError,
    PlanMismatchError,
    StoreError,
    UnfinishedError,
)
from sae_harvest.store.commits import commit_shard, committed_shards
from sae_harvest.store.layout import Plan
from sae_harvest.store.maintenance.merge import Merged, merge
from sae_harvest.store.maintenance.verify import verify
from sae_harvest.store.objects import LocalObjects, Objects, open_objects
from sae_harvest.store.reader import ActivationStore
from sae_harvest.store.seals import read_seal, seal
from sae_harvest.store.writer import create_store, write_shard
from tests.commands import invoke, refusal
from tests.s3_server import s3_server
from tests.synthetic import SITE, add_shards, make_plan, make_shard, make_store, rows_of

pytestmark = pytest.mark.usefixtures("unflushed")

N_SHARDS = 13  # of the synthetic store


def part(folder: Path, numbers: Sequence[int], plan: Plan | None = None) -> LocalObjects:
    """A store with some shards, as `harvest run --shards` leaves it."""
    plan = plan or make_plan()
    objects = LocalObjects(folder)
    create_store(objects, plan, {"torch": "2"})
    add_shards(objects, plan, numbers)
    return objects


def joined(target: Objects, *sources: Objects) -> Merged:
    return merge(target, sources, lambda done, total: None)


@pytest.fixture
def digest(tmp_path: Path) -> str:
    """Of the store that one machine makes alone."""
    make_store(tmp_path / "alone")
    return ActivationStore.open(tmp_path / "alone").digest


@pytest.fixture
def halves(tmp_path: Path) -> tuple[LocalObjects, LocalObjects]:
    return part(tmp_path / "a", range(7)), part(tmp_path / "b", range(7, N_SHARDS))


def test_two_halves_make_the_store_that_one_machine_makes(
    tmp_path: Path, digest: str, halves: tuple[LocalObjects, LocalObjects]
) -> None:
    target = LocalObjects(tmp_path / "whole")
    told: list[tuple[int, int]] = []
    merged = merge(target, halves, lambda done, total: told.append((done, total)))
    assert merged.digest == digest
    assert list(merged.copied) == list(range(N_SHARDS))
    assert merged.copied[6] == halves[0].place
    assert merged.copied[7] == halves[1].place
    assert (merged.already, merged.differing, merged.missing) == ([], [], [])
    store = ActivationStore.open(tmp_path / "whole")
    expected = rows_of(make_plan()).astype(np.float16)
    assert np.array_equal(store.read(SITE, 0, store.n_rows), expected)
    report = verify(target, lambda done, total: None)
    assert (report.digest, report.damage, report.leftovers) == (digest, [], [])
    assert told == sorted(told)
    assert told[-1] == (store.n_bytes, store.n_bytes)


def test_a_part_can_take_the_other_in(
    digest: str, halves: tuple[LocalObjects, LocalObjects]
) -> None:
    first, second = halves
    assert joined(first, second).digest == digest
    again = joined(first, second)
    assert again == Merged({}, list(range(7, N_SHARDS)), [], [], digest)


def test_parts_with_a_gap_are_merged_and_not_sealed(
    tmp_path: Path, digest: str, halves: tuple[LocalObjects, LocalObjects]
) -> None:
    target = LocalObjects(tmp_path / "whole")
    merged = joined(target, part(tmp_path / "c", [0, 1, 4]), part(tmp_path / "d", [6]))
    assert merged.missing == [2, 3, 5]
    assert merged.digest is None
    with pytest.raises(UnfinishedError, match="4 shards are committed and none is sealed"):
        ActivationStore.open(target.place)
    assert joined(target, *halves).digest == digest


def test_a_shard_that_is_there_is_kept_and_difference_told(tmp_path: Path) -> None:
    plan = make_plan()
    target, other = part(tmp_path / "a", range(4)), part(tmp_path / "b", [3])
    for number in (1, 4):
        noisy = make_shard(plan, number, noise=0.01)
        commit_shard(other, write_shard(other, plan, noisy))
    merged = joined(target, other)
    assert list(merged.copied) == [4]
    assert (merged.already, merged.differing) == ([1, 3], [1])
    store = ActivationStore.open(target.place)
    expected = rows_of(plan)[: store.n_rows]
    expected[4 * 128 :] *= np.float32(1.01)
    assert np.array_equal(store.read(SITE, 0, store.n_rows), expected.astype(np.float16))


def test_an_uncommitted_leftover_makes_way_for_what_was_committed(
    tmp_path: Path, digest: str, halves: tuple[LocalObjects, LocalObjects]
) -> None:
    plan = make_plan()
    target = part(tmp_path / "whole", [])
    write_shard(target, plan, make_shard(plan, 2, noise=0.01))  # killed before its commit
    target.publish(f"activations/{SITE}/c.9.0", [b"half a shard"])
    assert joined(target, *halves).digest == digest
    assert verify(target, lambda done, total: None).damage == []


def test_seals_of_the_sources_that_fit_are_taken_along(tmp_path: Path) -> None:
    plan = make_plan()
    grown = part(tmp_path / "a", range(4))
    early = seal(grown, plan, 4)["digest"]
    add_shards(grown, plan, [4, 5])
    target = LocalObjects(tmp_path / "whole")
    joined(target, grown, part(tmp_path / "b", range(4, 9)))
    assert ActivationStore.open(target.place, early).n_shards == 4
    assert ActivationStore.open(target.place).n_shards == 9
    other = part(tmp_path / "c", [])
    for number in range(3):
        commit_shard(other, write_shard(other, plan, make_shard(plan, number, noise=0.01)))
    foreign = seal(other, plan, 3)["digest"]
    joined(target, other)
    with pytest.raises(UnfinishedError, match="never sealed with the digest"):
        ActivationStore.open(target.place, foreign)
    assert read_seal(target, plan, 9)["shards"] == 9


@pytest.mark.parametrize(
    ("kind", "told"),
    [
        ("flipped", "is altered: its hash is not the committed one"),
        ("short", r"has [\d,]+ bytes instead of [\d,]+"),
        ("gone", "is missing"),
    ],
)
def test_damage_in_a_source_is_named_and_its_shard_not_taken(
    tmp_path: Path, digest: str, halves: tuple[LocalObjects, LocalObjects], kind: str, told: str
) -> None:
    key = f"activations/{SITE}/c.3.0"
    path = Path(halves[0].place, key)
    intact = path.read_bytes()
    damaged = {"flipped": bytes([intact[0] ^ 4]) + intact[1:], "short": intact[:-1], "gone": None}
    if damaged[kind] is None:
        path.unlink()
    else:
        path.write_bytes(damaged[kind])
    target = LocalObjects(tmp_path / "whole")
    with pytest.raises(DamagedError, match=rf"a/{key} {told}; `harvest .* merge again\.$"):
        joined(target, *halves)
    assert committed_shards(target) == [0, 1, 2]
    with pytest.raises(UnfinishedError):
        ActivationStore.open(target.place)
    path.write_bytes(intact)
    assert joined(target, *halves).digest == digest


def test_a_damaged_commit_record_is_named(halves: tuple[LocalObjects, LocalObjects]) -> None:
    first, second = halves
    path = Path(second.place, "commits/000008.json")
    path.write_bytes(path.read_bytes().replace(b"8", b"9", 1))
    with pytest.raises(DamagedError, match=r"b/commits/000008\.json"):
        joined(first, second)
    assert committed_shards(first) == list(range(7))


@pytest.mark.slow
def test_stores_are_merged_from_disk_to_bucket_and_from_bucket_to_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = make_plan(dtype="int8")
    make_store(tmp_path / "alone", plan, n_contexts=40)
    alone = ActivationStore.open(tmp_path / "alone")
    with s3_server() as server:
        for name, value in server.environment.items():
            monkeypatch.setenv(name, value)
        remote = open_objects(f"s3://{server.bucket}/second")
        create_store(remote, plan, {})
        add_shards(remote, plan, [2, 3, 4], n_contexts=40)
        local = part(tmp_path / "first", range(2), plan)
        bucket = open_objects(f"s3://{server.bucket}/whole")
        create_store(bucket, plan, {})
        write_shard(bucket, plan, make_shard(plan, 3, 40, noise=0.01))  # a leftover
        assert joined(bucket, local, remote).digest == alone.digest
        assert verify(bucket, lambda done, total: None).damage == []
        assert joined(bucket, local, remote).copied == {}
        disk = LocalObjects(tmp_path / "whole")
        assert joined(disk, bucket).digest == alone.digest
    store = ActivationStore.open(tmp_path / "whole")
    assert np.array_equal(store.read(SITE, 0, 640), alone.read(SITE, 0, 640))


class DiskGoneError(StoreError):
    pass


class Failing(LocalObjects):
    """Fails at the n-th write, before or after it has happened."""

    def __init__(self, root: Path, at: int, after: bool) -> None:
        super().__init__(root)
        self._left, self._after = at, after

    def publish(self, key: str, pieces: Sequence[Buffer]) -> bool:
        self._count(after=False)
        done = super().publish(key, pieces)
        self._count(after=True)
        return done

    def replace(self, key: str, pieces: Sequence[Buffer]) -> None:
        self._count(after=False)
        super().replace(key, pieces)
        self._count(after=True)

    def _count(self, after: bool) -> None:
        if after == self._after:
            self._left -= 1
            if self._left < 0:
                raise DiskGoneError


@pytest.mark.parametrize("after", [False, True])
def test_a_merge_that_fails_at_any_write_is_run_again_to_the_same_store(
    tmp_path: Path, after: bool
) -> None:
    plan = make_plan()
    make_store(tmp_path / "alone", plan, n_contexts=20)
    digest = ActivationStore.open(tmp_path / "alone").digest
    sources = []
    for name, number in (("a", 2), ("b", 0), ("c", 1)):
        sources.append(part(tmp_path / name, []))
        add_shards(sources[-1], plan, [number], n_contexts=20)
    failures = 0
    while True:
        place = tmp_path / f"whole{failures}"
        with suppress(DiskGoneError):
            assert joined(Failing(place, failures, after), *sources).digest == digest
            break
        if (place / "plan.json").exists():
            assert verify(LocalObjects(place), lambda done, total: None).damage == []
        assert joined(LocalObjects(place), *sources).digest == digest
        failures += 1
    assert failures > 15  # three shards of six objects, the plan, the seal and its metadata


def test_a_merge_killed_at_any_moment_is_run_again_to_the_same_store(
    tmp_path: Path, digest: str, halves: tuple[LocalObjects, LocalObjects]
) -> None:
    target = tmp_path / "whole"
    script = (
        "import sys; from sae_harvest.store.maintenance.merge import merge; "
        "from sae_harvest.store.objects import open_objects; "
        "a, b, into = map(open_objects, sys.argv[1:]); print('ready', flush=True); "
        "merge(into, [a, b], lambda done, total: None)"
    )
    command = [sys.executable, "-c", script, halves[0].place, halves[1].place, str(target)]
    killed = 0
    for pause in np.random.default_rng(0).uniform(0, 0.08, 5):
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            time.sleep(pause)
            process.kill()
        killed += process.returncode == -signal.SIGKILL
        if (target / "plan.json").exists():
            assert verify(LocalObjects(target), lambda done, total: None).damage == []
    assert killed
    assert joined(LocalObjects(target), *halves).digest == digest


def test_a_shard_committed_by_somebody_else_meanwhile_is_noticed(
    tmp_path: Path, halves: tuple[LocalObjects, LocalObjects]
) -> None:
    plan = make_plan()

    class Raced(LocalObjects):
        def publish(self, key: str, pieces: Sequence[Buffer]) -> bool:
            if key == f"activations/{SITE}/c.2.0":
                place = LocalObjects(Path(self.place))
                shard = make_shard(plan, 2, noise=0.01)
                commit_shard(place, write_shard(place, plan, shard))
            return super().publish(key, pieces)

    with pytest.raises(StoreError, match=r"Shard 2 of .* committed by somebody else"):
        joined(Raced(tmp_path / "whole"), *halves)


def test_stores_of_other_plans_are_refused_before_anything_is_written(
    tmp_path: Path, halves: tuple[LocalObjects, LocalObjects]
) -> None:
    other = part(tmp_path / "c", [0], make_plan(seed=3))
    target = tmp_path / "whole"
    with pytest.raises(PlanMismatchError, match=r"c was made .* than .*/a; .* --seed: 0 → 3"):
        joined(LocalObjects(target), *halves, other)
    assert not target.exists()
    with pytest.raises(PlanMismatchError, match=r"/a was made .* than .*/c; .* --seed: 3 → 0"):
        joined(other, *halves)
    assert committed_shards(other) == [0]


def test_what_cannot_be_merged_is_refused(
    tmp_path: Path, halves: tuple[LocalObjects, LocalObjects]
) -> None:
    with pytest.raises(NotAStoreError, match="holds no activation store"):
        joined(LocalObjects(tmp_path / "whole"), halves[0], LocalObjects(tmp_path / "none"))
    assert not (tmp_path / "whole").exists()
    with pytest.raises(InputError, match="merged into itself"):
        joined(halves[0], *halves)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    with pytest.raises(NotAStoreError, match=r"notes\.txt"):
        joined(LocalObjects(tmp_path / "mine"), *halves)
    assert [p.name for p in (tmp_path / "mine").iterdir()] == ["notes.txt"]


def test_a_disk_too_small_is_refused_before_any_copy(
    tmp_path: Path, halves: tuple[LocalObjects, LocalObjects]
) -> None:
    class Full(LocalObjects):
        def free_bytes(self) -> int:
            return 10_000

    with pytest.raises(StoreError, match=r"needs .* more and the disk has 10\.0 kB free"):
        joined(Full(tmp_path / "whole"), *halves)
    assert committed_shards(LocalObjects(tmp_path / "whole")) == []


def test_a_record_that_would_write_outside_of_the_target_is_refused(tmp_path: Path) -> None:
    plan = make_plan()
    source = part(tmp_path / "a", [])
    record = write_shard(source, plan, make_shard(plan, 0))
    record["objects"]["../../stolen"] = {"bytes": 4, "xxh3": "0" * 32}
    commit_shard(source, record)
    with pytest.raises(DamagedError, match=r"\.\./\.\./stolen, which is not an object"):
        joined(LocalObjects(tmp_path / "whole"), source)


def test_the_command_says_what_it_did(
    tmp_path: Path, digest: str, halves: tuple[LocalObjects, LocalObjects]
) -> None:
    first, second = (objects.place for objects in halves)
    target = str(tmp_path / "whole")
    begun = invoke("merge", "--into", target, second)
    assert begun.exit_code == 0, begun.stderr
    assert "6 shards copied" in begun.stdout
    assert "shards 0 to 6 are missing" in begun.stdout
    whole = invoke("merge", "--into", target, first, second)
    assert f"Digest {digest}." in whole.stdout
    assert "7 shards copied, 6 there already" in whole.stdout
    refusal(invoke("merge", "--into", target), code=2)
    assert "merged into itself" in refusal(invoke("merge", "--into", first, first))
