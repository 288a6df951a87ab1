"""Seals: each closes the first n shards of a plan as a store that readers open.

A harvest that reaches its target writes a seal; a longer harvest adds shards and another seal.
Earlier seals stay, so results made from a store before it grew still find that state by its digest.

A seal lists the digest of every commit record that it covers. Its own digest, which is the store's,
covers its whole content. So a reader can check each commit record, and each chunk by the checksums
in the record.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from sae_harvest.common.errors import DamagedError, UnfinishedError
from sae_harvest.store import layout
from sae_harvest.store.commits import (
    Count,
    Counts,
    Hash,
    MomentsRecord,
    Natural,
    NotNegative,
    StrictModel,
    committed_shards,
    load_commit,
    moments_fit,
    numbered,
    validate,
)
from sae_harvest.store.layout import Plan
from sae_harvest.store.objects import Objects
from sae_harvest.store.records import decode_record, digest_of, encode_record
from sae_harvest.store.statistics import stats
from sae_harvest.store.zarrjson import write_zarr_metadata

REMEDY = "`harvest verify --repair` mends it."


class _Statistics(StrictModel):
    ordinary: MomentsRecord
    outlier: MomentsRecord
    outlier_rule: str
    outlier_positions: Counts
    outlier_tokens: Counts
    outlier_dimensions: list[Count]
    norm_quantiles: dict[str, NotNegative]
    norm_max: NotNegative
    quantization_error: list[NotNegative] | None = None


class _Seal(StrictModel):
    plan: dict[str, Any]
    shards: Natural
    contexts: Natural
    rows: Natural
    bytes: Natural
    commits: list[Hash]
    statistics: dict[str, _Statistics]
    digest: Hash


class SealBuilder:
    """The seal of the shards added so far, from their commit records, one at a time."""

    def __init__(self, place: str, plan: Plan) -> None:
        self._place, self._plan = place, plan
        self._commits: list[str] = []
        self._contexts = self._bytes = 0
        self._merges = {site.name: stats.Merge() for site in plan.sites}

    @property
    def shards(self) -> int:
        return len(self._commits)

    def add(self, record: dict[str, Any], digest: str) -> None:
        """Add the next shard.

        Raises:
            DamagedError: the shard before it is short; only the last shard of a corpus may be.
        """
        if self._contexts < len(self._commits) * self._plan.contexts_per_shard:
            key = layout.commit_key(len(self._commits) - 1)
            raise DamagedError(
                f"{self._place}/{key} ends the corpus, and there are shards after it; "
                "run `harvest verify` on this store."
            )
        self._commits.append(digest)
        self._contexts += record["contexts"]
        self._bytes += sum(entry["bytes"] for entry in record["objects"].values())
        for site, merge in self._merges.items():
            merge.add(record["statistics"][site])

    def record(self) -> dict[str, Any]:
        """Return the content of the seal. At least one shard must have been added."""
        content = {
            "plan": self._plan.model_dump(mode="json"),
            "shards": len(self._commits),
            "contexts": self._contexts,
            "rows": self._contexts * self._plan.context_length,
            "bytes": self._bytes,
            "commits": list(self._commits),
            "statistics": {site: merge.to_json() for site, merge in self._merges.items()},
        }
        return content | {"digest": digest_of(content)}


def seal(objects: Objects, plan: Plan, n_shards: int) -> dict[str, Any]:
    """Seal the first `n_shards` shards, which must be committed, and return the seal's record.

    Raises:
        DamagedError: a commit record is damaged, or an existing seal of `n_shards` differs.
    """
    (record,) = make_seals(objects, plan, [n_shards])
    # The arrays' shapes come first: a reader that knows only zarr may see committed shards that
    # are not sealed yet, but never a seal with rows that it cannot see.
    if n_shards >= max(sealed_counts(objects), default=0):
        write_zarr_metadata(objects, plan, record["contexts"])
    key = layout.seal_key(n_shards)
    if not objects.publish(key, [encode_record(record)]):
        there = read_seal(objects, plan, n_shards)
        if there["digest"] != record["digest"]:
            raise DamagedError(
                f"{objects.place}/{key} does not match the store's commits; {REMEDY}"
            )
    latest = sealed_counts(objects)[-1]
    if latest > n_shards:  # another driver sealed meanwhile: we may have overwritten its shapes
        write_zarr_metadata(objects, plan, read_seal(objects, plan, latest)["contexts"])
    sweep(objects)
    return record


def sweep(objects: Objects) -> None:
    """Remove temporary files of killed writers."""
    for key in objects.leftovers():
        objects.remove(key)


def make_seals(objects: Objects, plan: Plan, counts: Sequence[int]) -> list[dict[str, Any]]:
    """Return the seals of the first n shards for each n in `counts`; reads each commit record once.

    Raises:
        DamagedError: a commit record is missing or damaged, or a shard before the last is short.
    """
    builder = SealBuilder(objects.place, plan)
    seals = []
    for before, count in pairwise([0, *counts]):
        for shard in range(before, count):
            builder.add(*load_commit(objects, plan, shard))
        seals.append(builder.record())
    return seals


def sealed_counts(objects: Objects) -> list[int]:
    """Return the numbers of shards that have been sealed, ascending."""
    return [count for count in numbered(objects, layout.seal_key) if count > 0]


def read_seal(objects: Objects, plan: Plan, n_shards: int) -> dict[str, Any]:
    """Return the checked seal of `n_shards`.

    Raise `DamagedError` if missing, altered or foreign.
    """
    key = layout.seal_key(n_shards)
    name = f"{objects.place}/{key}"
    try:
        record = decode_record(objects.read(key), name)
    except FileNotFoundError:
        raise DamagedError(f"{name} is missing; {REMEDY}") from None
    if record.get("shards") != n_shards or record.get("plan") != plan.model_dump(mode="json"):
        raise DamagedError(f"{name} belongs to another store.")
    check_seal(plan, record, name)
    return record


def check_seal(plan: Plan, record: dict[str, Any], name: str) -> None:
    """Raise `DamagedError` if no commit records give a seal with this content."""
    validate(_Seal, record, name)
    shards, contexts, rows = record["shards"], record["contexts"], record["rows"]
    full = plan.contexts_per_shard
    fits = (
        len(record["commits"]) == shards
        and (shards - 1) * full < contexts <= shards * full
        and rows == contexts * plan.context_length
        and record["statistics"].keys() == {site.name for site in plan.sites}
        and all(
            moments_fit(found, plan, site, rows)
            and all(dimension < plan.width(site) for dimension in found["outlier_dimensions"])
            for site, found in record["statistics"].items()
        )
    )
    if not fits:
        raise DamagedError(f"{name} is damaged: its numbers contradict its plan; {REMEDY}")
    content = {field: value for field, value in record.items() if field != "digest"}
    if record["digest"] != digest_of(content):
        raise DamagedError(f"{name} is damaged: its digest is not that of its content; {REMEDY}")


def trusted_commits(objects: Objects, plan: Plan) -> list[str]:
    """Return the digests of the sealed commit records, from the latest undamaged seal.

    The list is empty without such a seal. Shards that are not sealed yet are protected by the
    checksums of their records alone.
    """
    for n_shards in reversed(sealed_counts(objects)):
        try:
            return read_seal(objects, plan, n_shards)["commits"]
        except DamagedError:
            continue
    return []


def find_seal(objects: Objects, plan: Plan, digest: str | None) -> dict[str, Any]:
    """Return the latest seal, or the seal with the given digest.

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
