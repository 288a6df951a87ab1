"""One store out of several with equal plans: machines without shared storage, each with its part.

What is copied is checked on the way: every object is read whole and compared with its commit
record, and the commit record goes last, as in any writing. Killed anywhere, a merge is run again.
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
    """The result of a merge.

    copied: shards taken from a source, each with its place; already: shards of the sources that the
    target had; differing: those of them whose objects are not the same in both, last bits that
    another machine computes otherwise; missing: gaps below the last shard. The digest is None where
    there are gaps: nothing new is sealed then.
    """

    copied: dict[int, str]
    already: list[int]
    differing: list[int]
    missing: list[int]
    digest: str | None


def merge(target: Objects, sources: Sequence[Objects], on_progress: OnProgress) -> Merged:
    """Copy every committed shard that the target lacks, from the first source that has it.

    The target may be empty. A shard that it has is kept. Where the target then has its first n
    shards and no others, they are sealed; seals of the sources that fit them are taken along, so
    that what was made from a source finds its store in the target as well.

    Raises:
        NotAStoreError: a source is no store, or the target is something else.
        PlanMismatchError: the plans are not equal; names the fields.
        DamagedError: an object or record of a source or of the target is not as it was committed;
            names it. The shards before it are merged; its own is not there at all.
        StoreError: no room for what is to be copied; it cannot be written.
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
    """Return a commit record, the sealed one where the shard is sealed: `trusted_commits`."""
    return load_commit(objects, plan, shard, sealed[shard] if shard < len(sealed) else None)[0]


def _copy_shard(source: Objects, target: Objects, record: dict[str, Any]) -> None:
    """Copy the objects of a committed shard, each checked, and then its commit record.

    What a killed writer left uncommitted in the target makes way: the record that comes describes
    the objects that come.
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
    """The plan of all; a new target is created from it, once every plan has been compared."""
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
    """Seal all shards, and before that what sources had sealed and is the same here."""
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
