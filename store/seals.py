"""Seals: the first n shards of a plan, closed as a store that readers open.

A harvest that reaches its target seals it; a longer one adds shards and another seal. Earlier
seals stay, so that what was made from a store before it grew still finds that store, by digest.
"""

from __future__ import annotations

from typing import Any

from store import layout, stats
from store.errors import DamagedError, UnfinishedError
from store.layout import Plan
from store.objects import Objects
from store.records import canonical, decode_record, digest_of, encode_record
from store.writer import committed_shards, numbered, read_commit

REMEDY = "`harvest verify --repair` mends it."


def seal(objects: Objects, plan: Plan, n_shards: int) -> dict[str, Any]:
    """Seal the first shards, all of them committed, and return the seal's record.

    Raises:
        DamagedError: a commit record is damaged, or an earlier seal of so many shards differs.
    """
    record = make_seal(objects, plan, n_shards)
    # The arrays' shapes first: a reader that knows only zarr may see committed shards that are
    # not sealed yet, never a seal whose rows it cannot see.
    if n_shards >= max(sealed_counts(objects), default=0):
        write_zarr_metadata(objects, record["zarr"])
    key = layout.seal_key(n_shards)
    if not objects.publish(key, [encode_record(record)]):
        there = read_seal(objects, plan, n_shards)
        if there["digest"] != record["digest"]:
            raise DamagedError(
                f"{objects.place}/{key} does not match the commits beside it; {REMEDY}"
            )
        record = there
    latest = sealed_counts(objects)[-1]
    if latest > n_shards:  # by another driver meanwhile: the shapes may have become ours again
        write_zarr_metadata(objects, read_seal(objects, plan, latest)["zarr"])
    sweep(objects)
    return record


def sweep(objects: Objects) -> None:
    """Remove what writers that were killed have left lying about."""
    for key in objects.leftovers():
        objects.remove(key)


def make_seal(objects: Objects, plan: Plan, n_shards: int) -> dict[str, Any]:
    """The seal of the first shards, from their commit records."""
    commits = [read_commit(objects, plan, shard) for shard in range(n_shards)]
    contexts = sum(c["contexts"] for c in commits)
    return {
        "digest": store_digest(plan, commits),
        "plan": plan.model_dump(mode="json"),
        "shards": n_shards,
        "contexts": contexts,
        "rows": contexts * plan.context_length,
        "bytes": sum(o["bytes"] for c in commits for o in c["objects"].values()),
        "zarr": layout.zarr_metadata(plan, contexts),
        "statistics": {
            s.name: stats.merge(c["statistics"][s.name] for c in commits) for s in plan.sites
        },
    }


def store_digest(plan: Plan, commits: list[dict[str, Any]]) -> str:
    """xxh3-128 over the plan's hash and the objects of every commit.

    It covers nothing that varies between two runs of one plan.
    """
    return digest_of([plan.hash, [c["objects"] for c in commits]])


def sealed_counts(objects: Objects) -> list[int]:
    """The numbers of shards that have been sealed, ascending."""
    return numbered(objects, "seals/")


def read_seal(objects: Objects, plan: Plan, n_shards: int) -> dict[str, Any]:
    """The checked seal of so many shards; `DamagedError` if missing, altered or foreign."""
    key = layout.seal_key(n_shards)
    try:
        record = decode_record(objects.read(key), f"{objects.place}/{key}")
    except FileNotFoundError:
        raise DamagedError(f"{objects.place}/{key} is missing; {REMEDY}") from None
    if record.get("shards") != n_shards or record.get("plan") != plan.model_dump(mode="json"):
        raise DamagedError(f"{objects.place}/{key} belongs to another store.")
    return record


def find_seal(objects: Objects, plan: Plan, digest: str | None) -> dict[str, Any]:
    """The latest seal, or the one with a digest.

    Raises:
        UnfinishedError: nothing is sealed, or nothing with that digest.
        DamagedError: a seal is damaged.
    """
    counts = sealed_counts(objects)
    if not counts:
        done = len(committed_shards(objects))
        raise UnfinishedError(
            f"{objects.place} is not finished: {done} shards are committed and none is sealed; "
            "run the same `harvest run` command again to continue it."
        )
    for n_shards in reversed(counts):
        record = read_seal(objects, plan, n_shards)
        if digest in (None, record["digest"]):
            return record
    raise UnfinishedError(
        f"{objects.place} was never sealed with the digest {digest}; it is another store than the "
        "one that was used before."
    )


def write_zarr_metadata(objects: Objects, metadata: dict[str, Any]) -> None:
    """Bring every `zarr.json` up to date."""
    for key, content in metadata.items():
        wanted = canonical(content)
        try:
            there = objects.read(key)
        except FileNotFoundError:
            there = b""
        if there != wanted:
            objects.replace(key, [wanted])
