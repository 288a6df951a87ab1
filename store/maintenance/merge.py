"""Merging stores with equal plans into one: for machines that harvest without shared storage.

Every object is read whole and compared with its commit record before it is written. The commit
record is written last. A merge that was killed can be run again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from sae_harvest.common.errors import InputError, PlanMismatchError, StoreError
from sae_harvest.store import layout
from sae_harvest.store.commits import (
    commit_shard,
    committed_shards,
    load_commit,
    read_object,
    read_plan,
    read_plan_record,
)
from sae_harvest.store.layout import Plan
from sae_harvest.store.objects import Objects, require_space
from sae_harvest.store.seals import make_seals, read_seal, seal, sealed_counts, trusted_commits
from sae_harvest.store.writer import WRITERS, check_place, create_store

OnProgress = Callable[[int, int], None]  # bytes copied, bytes to copy


@dataclass(frozen=True, slots=True)
class Merged:
    """The result of a merge."""

    copied: dict[int, str]
    """Shards taken from a source → place of that source."""
    already: list[int]
    """Shards of the sources that the target had already."""
    differing: list[int]
    """Shards in `already` whose objects differ: another machine may compute other last bits."""
    missing: list[int]
    """Gaps below the last shard."""
    digest: str | None
    """Digest of the sealed target; None if there are gaps, since nothing new is sealed then."""


def merge(target: Objects, sources: Sequence[Objects], on_progress: OnProgress) -> Merged:
    """Copy every committed shard that the target lacks, from the first source that has it.

    The target may be empty. Shards that it has are kept. If the target then has its first n shards
    and no others, they are sealed. Matching seals of the sources are copied, so that results made
    from a source find their store in the target as well.

    Raises:
        NotAStoreError: a source is not a store, or the target holds something else.
        PlanMismatchError: the plans are not equal; names the fields.
        DamagedError: an object or record of a source or of the target is damaged; names it. The
            shards before it are merged; its own shard is not.
        StoreError: there is no room for the copies, or an object cannot be written.
    """
    plan = _common_plan(target, sources)
    sealed = trusted_commits(target, plan)
    there = {u: _commit(target, plan, u, sealed)["objects"] for u in committed_shards(target)}
    todo: dict[int, tuple[Objects, list[str]]] = {}
    already, differing = set(), set()
    total = 0
    for source in sources:
        sealed = trusted_commits(source, plan)
        for shard in committed_shards(source):
            offered = _commit(source, plan, shard, sealed)["objects"]
            if shard not in there:
                there[shard], todo[shard] = offered, (source, sealed)
                total += sum(entry["bytes"] for entry in offered.values())
                continue
            already.add(shard)
            if offered != there[shard]:
                differing.add(shard)
    require_space(target, total, "or merge into another place")
    done = 0
    todo = dict(sorted(todo.items()))
    for shard, (source, sealed) in todo.items():
        _copy_shard(source, target, _commit(source, plan, shard, sealed))
        done += sum(entry["bytes"] for entry in there[shard].values())
        on_progress(done, total)
    missing = sorted(set(range(max(there, default=-1) + 1)) - set(there))
    return Merged(
        copied={shard: source.place for shard, (source, _) in todo.items()},
        already=sorted(already),
        differing=sorted(differing),
        missing=missing,
        digest=_close(target, sources, plan, len(there)) if there and not missing else None,
    )


def _commit(objects: Objects, plan: Plan, shard: int, sealed: Sequence[str]) -> dict[str, Any]:
    """Return a commit record, checked against `sealed` (see `trusted_commits`)."""
    return load_commit(objects, plan, shard, sealed[shard] if shard < len(sealed) else None)[0]


def _copy_shard(source: Objects, target: Objects, record: dict[str, Any]) -> None:
    """Copy the objects of a committed shard, each checked, and then its commit record.

    Objects that a killed writer left uncommitted in the target are replaced, since the copied
    record describes the copied objects.
    """
    shard = record["shard"]

    def copy(key: str) -> None:
        data = read_object(source, key, record["objects"][key], _REMEDY)
        if not target.publish(key, [data]) and not _same(target, key, data):
            if target.size(layout.commit_key(shard)) is not None:
                raise _taken(target, shard)
            target.replace(key, [data])

    with ThreadPoolExecutor(WRITERS) as pool:
        list(pool.map(copy, record["objects"]))
    if commit_shard(target, record)["objects"] != record["objects"]:
        raise _taken(target, shard)


def _common_plan(target: Objects, sources: Sequence[Objects]) -> Plan:
    """Compare all plans, create the target if it is new, and return the common plan."""
    if target.place in {source.place for source in sources}:
        raise InputError(
            f"{target.place} cannot be merged into itself; leave it out of the sources."
        )
    check_place(target)
    plans = [(source.place, read_plan(source)) for source in sources]
    if target.size(layout.PLAN_KEY) is not None:
        plans.insert(0, (target.place, read_plan(target)))
    first, plan = plans[0]
    for place, other in plans[1:]:
        if differing := plan.differing_fields(other):
            raise PlanMismatchError(
                f"{place} was made from another plan than {first}; differing: "
                f"{'; '.join(differing)}. Only stores of equal plans can be merged."
            )
    return create_store(target, plan, read_plan_record(sources[0])["made_with"])


def _same(target: Objects, key: str, data: bytes) -> bool:
    try:
        return target.read(key) == data
    except FileNotFoundError:  # removed meanwhile
        return False


def _taken(target: Objects, shard: int) -> StoreError:
    return StoreError(
        f"Shard {shard} of {target.place} was committed by somebody else during the merge; run "
        "`harvest verify` on it, and merge when nobody else writes there."
    )


def _close(target: Objects, sources: Sequence[Objects], plan: Plan, n_shards: int) -> str:
    """Seal all shards, and before that every seal of a source that matches the target."""
    wanted: dict[int, set[str]] = {}
    for source in sources:
        for count in sealed_counts(source):
            if count < n_shards:
                wanted.setdefault(count, set()).add(read_seal(source, plan, count)["digest"])
    *earlier, _ = make_seals(target, plan, [*sorted(wanted), n_shards])
    for made in earlier:
        if made["digest"] in wanted[made["shards"]]:
            seal(target, plan, made["shards"])
    return seal(target, plan, n_shards)["digest"]


_REMEDY = "; `harvest verify --repair` mends it, then merge again"
