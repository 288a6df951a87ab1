"""Repairing a damaged store: remove damaged objects, harvest them again, and update the records.

The same software on the same kind of processor makes the same bytes again, and the store keeps its
digest. Otherwise the shard's commit record and the seals are rewritten; the store is whole again,
with another digest.
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
    """Restore plan.json from a seal if it is damaged, missing or foreign. True if it was restored.

    Raises:
        NotAStoreError: there is neither plan.json nor a seal.
        DamagedError: plan.json is damaged and nothing is sealed.
        StoreError: the store has another format.
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
    """Return the plan in a seal; None if the seal is damaged or has another format."""
    key = layout.seal_key(n_shards)
    try:
        record = decode_record(objects.read(key), key)
        plan = parse_plan(record.get("plan"), key)
        check_seal(plan, record, key)
    except DamagedError:
        return None
    return plan


def remove_damaged(objects: Objects, damage: Iterable[Damage]) -> None:
    """Remove the damaged objects of shards. The intact objects beside them will be adopted.

    int8 codes are removed together with their exact rows or scale: a new harvest may differ in the
    last bits, and then in the rows that are kept exactly.
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
    """Remove each shard whose remade commit record differs from the sealed one.

    Adopted objects may have been altered together with the old record, so they have to be made
    again as well.

    Args:
        made: shard → digest of its new record, for shards whose records were damaged.
        sealed: digests of the sealed records, from an undamaged seal.

    Returns:
        The numbers of the removed shards.
    """
    untrusted = [u for u, digest in made.items() if u < len(sealed) and digest != sealed[u]]
    for shard in untrusted:
        for key in (layout.commit_key(shard), *layout.object_keys(plan, shard)):
            objects.remove(key)
    return sorted(untrusted)


def mend_commit(objects: Objects, plan: Plan, record: dict[str, Any]) -> None:
    """Replace the commit record of a remade shard if the existing one differs."""
    try:
        if load_commit(objects, plan, record["shard"])[1] == digest_of(record):
            return
    except DamagedError:
        pass  # the record to repair
    objects.replace(layout.commit_key(record["shard"]), [encode_record(record)])


def reseal(objects: Objects, plan: Plan) -> None:
    """Rewrite seals and zarr metadata that contradict the commits, and remove leftovers."""
    sweep(objects)
    counts = sealed_counts(objects)
    seals = make_seals(objects, plan, counts)
    # The latest first: commit records are checked against it.
    for n_shards, made in zip(reversed(counts), reversed(seals), strict=True):
        try:
            is_right = read_seal(objects, plan, n_shards) == made
        except DamagedError:
            is_right = False
        if not is_right:
            objects.replace(layout.seal_key(n_shards), [encode_record(made)])
    if seals:
        write_zarr_metadata(objects, plan, seals[-1]["contexts"])
