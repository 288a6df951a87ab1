"""Mending a damaged store: take the damage away, let it be made again, bring the records in line.

What is made again by the same software on the same kind of processor is the same to the byte, and
the store's digest with it. Where it is not, the shard's commit record and the seals are written
anew, the store is whole again, and its digest is another one.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from store import layout
from store.errors import DamagedError, NotAStoreError
from store.layout import Plan
from store.objects import Objects
from store.records import decode_record, encode_record
from store.seals import make_seal, read_seal, sealed_counts, sweep, write_zarr_metadata
from store.verify import Damage
from store.writer import read_commit, read_plan_record


def restore_plan(objects: Objects) -> bool:
    """Write plan.json again from a seal if it is damaged or gone; whether it was.

    Raises:
        NotAStoreError: no plan.json and no seal there.
        DamagedError: it is damaged and nothing is sealed, or it is of another format.
    """
    try:
        read_plan_record(objects)
        return False
    except (DamagedError, NotAStoreError) as error:
        for n_shards in reversed(sealed_counts(objects)):
            key = layout.seal_key(n_shards)
            try:
                content = decode_record(objects.read(key), key)["plan"]
            except DamagedError:
                continue
            if content.get("format") != layout.FORMAT:
                raise
            plan = Plan.model_validate(content)
            record = {"plan": content, "hash": plan.hash, "made_with": {}}
            objects.replace(layout.PLAN_KEY, [encode_record(record)])
            return True
        if isinstance(error, NotAStoreError):
            raise
        raise DamagedError(
            f"{error} Nothing is sealed there that it could be restored from; harvest into "
            "another --store."
        ) from error


def remove_damaged(objects: Objects, damage: Iterable[Damage]) -> None:
    """Remove the damaged objects of shards; their intact neighbours will be adopted.

    int8 codes go with the exact rows or the scale that they were made with: what is made again
    may differ in its last bits, and then in which rows are kept exactly.
    """
    for item in damage:
        if item.shard is None:
            continue
        kind, _, rest = item.key.partition("/")
        if kind in ("exact", "quantization"):
            site = rest.partition("/")[0]
            objects.remove(layout.chunk_key(f"activations/{site}", item.shard))
        objects.remove(item.key)


def mend_commit(objects: Objects, plan: Plan, record: dict[str, Any]) -> None:
    """Put the commit record of a shard that was made again in place of one that differs."""
    try:
        if read_commit(objects, plan, record["shard"])["objects"] == record["objects"]:
            return
    except DamagedError:
        pass  # what is being mended
    objects.replace(layout.commit_key(record["shard"]), [encode_record(record)])


def reseal(objects: Objects, plan: Plan) -> None:
    """Bring every seal and the zarr metadata in line with the commits, and sweep up."""
    sweep(objects)
    latest = None
    for n_shards in sealed_counts(objects):
        latest = make_seal(objects, plan, n_shards)
        try:
            there = read_seal(objects, plan, n_shards)
        except DamagedError:
            there = None
        if there is None or there["digest"] != latest["digest"]:
            objects.replace(layout.seal_key(n_shards), [encode_record(latest)])
        else:
            latest = there
    if latest is not None:
        write_zarr_metadata(objects, latest["zarr"])
