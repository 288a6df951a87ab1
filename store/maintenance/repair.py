"""Mending a damaged store: take the damage away, let it be made again, bring the records in line.

What is made again by the same software on the same kind of processor is the same to the byte, and
the store's digest with it. Where it is not, the shard's commit record and the seals are written
anew, the store is whole again, and its digest is another one.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from sae_harvest.common.errors import DamagedError, NotAStoreError
from sae_harvest.store import layout
from sae_harvest.store.commits import load_commit, parse_plan, read_plan
from sae_harvest.store.layout import Plan
from sae_harvest.store.maintenance.verify import Damage
from sae_harvest.store.objects import Objects
from sae_harvest.store.records import decode_record, digest_of, encode_record
from sae_harvest.store.seals import check_seal, make_seals, read_seal, sealed_counts, sweep
from sae_harvest.store.zarrjson import write_zarr_metadata


def restore_plan(objects: Objects) -> bool:
    """Write plan.json again from a seal if it is damaged, gone or another store's; whether it was.

    Raises:
        NotAStoreError: no plan.json and no seal there.
        DamagedError: it is damaged and nothing is sealed.
        StoreError: it is of another format.
    """
    plan, problem = None, None
    try:
        plan = read_plan(objects)
    except (DamagedError, NotAStoreError) as error:
        problem = error
    for n_shards in reversed(sealed_counts(objects)):
        sealed = _plan_of_seal(objects, n_shards)
        if sealed is not None and sealed == plan:
            return False
        if sealed is not None:
            record = {"plan": sealed.model_dump(mode="json"), "hash": sealed.hash, "made_with": {}}
            objects.replace(layout.PLAN_KEY, [encode_record(record)])
            return True
    if problem is None:
        return False
    if isinstance(problem, NotAStoreError):
        raise problem
    raise DamagedError(
        f"{problem} Nothing is sealed there that it could be restored from; harvest into "
        "another --store."
    ) from problem


def _plan_of_seal(objects: Objects, n_shards: int) -> Plan | None:
    """Return the plan that a seal holds, None if the seal is damaged or of another format."""
    key = layout.seal_key(n_shards)
    try:
        record = decode_record(objects.read(key), key)
        plan = parse_plan(record.get("plan"), key)
        check_seal(plan, record, key)
    except DamagedError:
        return None
    return plan


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


def remove_untrusted(
    objects: Objects, plan: Plan, made: Mapping[int, str], sealed: Sequence[str]
) -> list[int]:
    """Remove all of a shard whose commit record was made again and is not the one that was sealed.

    Objects that were adopted for it may have been altered together with the record that vouched
    for them: they have to be made again as well.

    Args:
        made: shard → digest of its new record, for the shards whose records were damaged.
        sealed: digests of the sealed records, from a seal that is whole.

    Returns:
        The numbers of those shards.
    """
    untrusted = [u for u, digest in made.items() if u < len(sealed) and digest != sealed[u]]
    for shard in untrusted:
        for key in (layout.commit_key(shard), *layout.object_keys(plan, shard)):
            objects.remove(key)
    return sorted(untrusted)


def mend_commit(objects: Objects, plan: Plan, record: dict[str, Any]) -> None:
    """Put the commit record of a shard that was made again in place of one that differs."""
    try:
        if load_commit(objects, plan, record["shard"])[1] == digest_of(record):
            return
    except DamagedError:
        pass  # what is being mended
    objects.replace(layout.commit_key(record["shard"]), [encode_record(record)])


def reseal(objects: Objects, plan: Plan) -> None:
    """Bring every seal and the zarr metadata in line with the commits, and sweep up."""
    sweep(objects)
    counts = sealed_counts(objects)
    seals = make_seals(objects, plan, counts)
    # The latest first: it is the one that commit records are held against.
    for n_shards, made in zip(reversed(counts), reversed(seals), strict=True):
        try:
            is_right = read_seal(objects, plan, n_shards) == made
        except DamagedError:
            is_right = False
        if not is_right:
            objects.replace(layout.seal_key(n_shards), [encode_record(made)])
    if seals:
        write_zarr_metadata(objects, plan, seals[-1]["contexts"])
