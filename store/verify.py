"""Re-read and re-hash everything, and name each damaged object."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import accumulate, chain, count, takewhile
from typing import Any

from store import layout
from store.errors import DamagedError
from store.layout import Plan
from store.objects import Objects
from store.records import canonical, decode_record
from store.seals import read_seal, sealed_counts, store_digest
from store.writer import committed_shards, read_commit, read_object, read_plan

READERS = 4  # objects read at once; a cold disk or a bucket needs several to be busy


@dataclass(frozen=True, slots=True)
class Damage:
    """One object that is not as it was written; `shard` is None for what belongs to no shard."""

    key: str
    shard: int | None
    sentence: str


@dataclass(frozen=True, slots=True)
class Report:
    """What a verification found.

    digest is the store's, if nothing is damaged and something sealed; sealed_digest is what that
    seal says; beyond_seal counts the shards that are committed and not sealed yet.
    """

    objects: int
    n_bytes: int
    shards: int
    beyond_seal: int
    digest: str | None
    sealed_digest: str | None
    damage: list[Damage]
    leftovers: list[str]


def verify(objects: Objects, on_progress: Callable[[int, int], None]) -> Report:
    """Check a store, finished or not.

    Args:
        on_progress: called with (bytes read, bytes to read).

    Raises:
        NotAStoreError: no store there.
        DamagedError: plan.json itself is damaged, so that nothing else can be judged.
    """
    plan = read_plan(objects)
    counts = sealed_counts(objects)
    committed = committed_shards(objects)
    shards = sorted({*committed, *range(max(counts, default=0))})
    damage: list[Damage] = []
    commits: dict[int, dict[str, Any]] = {}
    for shard in shards:
        try:
            commits[shard] = read_commit(objects, plan, shard)
        except DamagedError as error:
            damage.append(Damage(layout.commit_key(shard), shard, str(error)))
    items = [(u, *entry) for u, commit in commits.items() for entry in commit["objects"].items()]
    total, done = sum(entry["bytes"] for _, _, entry in items), 0
    with ThreadPoolExecutor(READERS) as pool:
        found = pool.map(lambda item: _damage_of(objects, item[1], item[2]), items)
        for (shard, key, entry), text in zip(items, found, strict=True):
            if text:
                damage.append(Damage(key, shard, text))
            done += entry["bytes"]
            on_progress(done, total)
    sealed_digest = None
    for n_shards in counts:
        sealed_digest = None
        try:
            sealed_digest = read_seal(objects, plan, n_shards)["digest"]
            _check_seal(objects, plan, n_shards, sealed_digest, commits)
        except DamagedError as error:
            damage.append(Damage(layout.seal_key(n_shards), None, str(error)))
    damage += _metadata_damage(objects, plan, counts, commits)
    sealed = max(counts, default=0)
    return Report(
        objects=len(items),
        n_bytes=done,
        shards=len(commits),
        beyond_seal=sum(shard >= sealed for shard in committed),
        digest=None if damage else sealed_digest,
        sealed_digest=sealed_digest,
        damage=damage,
        leftovers=objects.leftovers(),
    )


def _damage_of(objects: Objects, key: str, entry: dict[str, Any]) -> str | None:
    """What is wrong with an object, None if nothing is."""
    try:
        read_object(objects, key, entry)
    except DamagedError as error:
        return str(error)
    return None


def _check_seal(
    objects: Objects, plan: Plan, n_shards: int, digest: str, commits: dict[int, dict[str, Any]]
) -> None:
    """`DamagedError` if a digest is not that of the commits it covers, all of them intact."""
    covered = [commits[shard] for shard in range(n_shards) if shard in commits]
    if len(covered) == n_shards and store_digest(plan, covered) != digest:
        raise DamagedError(
            f"{objects.place}/{layout.seal_key(n_shards)} does not match the commits beside it."
        )


def _metadata_damage(
    objects: Objects, plan: Plan, counts: list[int], commits: dict[int, dict[str, Any]]
) -> Iterator[Damage]:
    """Every zarr.json against the latest seal, and the heartbeat, if a harvest left one.

    A harvest that was killed just before its seal has left the shapes of what it would seal.
    """
    if counts:
        unbroken = takewhile(commits.__contains__, count())
        lengths = [commits[shard]["contexts"] for shard in unbroken]
        grown = list(accumulate(lengths))[counts[-1] :]
        for key, content in _zarr_metadata(objects, plan, counts[-1]).items():
            wanted = chain([content], _reshaped(plan, key, content, grown))
            try:
                there = objects.read(key)
            except FileNotFoundError:
                there = b""
            if not any(there == canonical(possible) for possible in wanted):
                yield Damage(key, None, f"{objects.place}/{key} is missing or altered.")
    try:
        decode_record(objects.read(layout.STATUS_KEY), f"{objects.place}/{layout.STATUS_KEY}")
    except FileNotFoundError:
        pass
    except DamagedError as error:
        yield Damage(layout.STATUS_KEY, None, str(error))


def _reshaped(
    plan: Plan, key: str, content: dict[str, Any], grown: list[int]
) -> Iterator[dict[str, Any]]:
    """The content of an array's zarr.json for stores of other numbers of contexts."""
    path = key.rpartition("/")[0]
    if content["node_type"] == "array":
        for contexts in grown:
            shape = layout.array_specs(plan, contexts)[path]["shape"]
            yield content | {"shape": list(shape)}


def _zarr_metadata(objects: Objects, plan: Plan, n_shards: int) -> dict[str, Any]:
    try:
        return read_seal(objects, plan, n_shards)["zarr"]
    except DamagedError:  # reported already, and mended first
        return {}
