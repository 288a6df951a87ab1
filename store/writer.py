"""Writing a store: create it, publish a shard's objects, commit the shard.

A writer may be killed at any time, since the order is: objects first, then the commit record that
lists them, and a seal once all requested shards are committed (see `store.seals`). Nothing is
overwritten, except by a repair.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from sae_harvest.common.atomic import Buffer
from sae_harvest.common.errors import DamagedError, NotAStoreError, PlanMismatchError
from sae_harvest.common.finite import all_finite
from sae_harvest.store import codec, layout
from sae_harvest.store.commits import read_plan
from sae_harvest.store.layout import Plan
from sae_harvest.store.objects import Objects, content_hash, total_bytes
from sae_harvest.store.records import encode_record
from sae_harvest.store.statistics import quantize, stats
from sae_harvest.store.tables import encode_table, exact_table, exact_values

WRITERS = 4  # objects of a shard written at once: their flushes overlap

Pieces = Sequence[Buffer]
Check = Callable[[bytes], None]  # raises DamagedError for wrong bytes


@dataclass(frozen=True, slots=True)
class Shard:
    """One shard of the plan: its text, which a worker completes with activations and norms."""

    number: int
    """Number of the shard, from 0."""
    tokens: npt.NDArray[np.int32]
    """Token ids, int32 [contexts, context_length]."""
    pieces: pa.Table
    """PIECE_SCHEMA: one row for each part of a document in a context, by (context, start)."""
    documents: pa.Table
    """DOCUMENT_SCHEMA: one row for each document whose first piece in the store is in this shard.

    With TEXT_FIELD if texts are kept."""
    activations: dict[str, npt.NDArray[Any]] = field(default_factory=dict)
    """By site: [rows, width] in the stored dtype (float16 for int8)."""
    norms: dict[str, npt.NDArray[np.float32]] = field(default_factory=dict)
    """By site: [rows], before any casting."""
    cursor: dict[str, Any] = field(default_factory=dict)
    """Where the text of its first context begins in the corpus, in values that JSON keeps."""


def create_store(objects: Objects, plan: Plan, made_with: dict[str, str]) -> Plan:
    """Create the store, or adopt an existing store with an equal plan.

    Args:
        made_with: versions of the libraries, kept for provenance; not part of the identity.

    Raises:
        NotAStoreError: the place holds something else.
        PlanMismatchError: the place holds a store of another plan; names the differing fields.
    """
    check_place(objects)
    record: dict[str, Any] = {
        "plan": plan.model_dump(mode="json"),
        "hash": plan.hash,
        "made_with": made_with,
    }
    objects.publish(layout.PLAN_KEY, [encode_record(record)])
    existing = read_plan(objects)
    check_same(objects, existing, plan)
    return existing


def check_same(objects: Objects, existing: Plan, plan: Plan) -> None:
    """Raise `PlanMismatchError` if two plans differ; it names the differing fields."""
    if differing := existing.differing_fields(plan):
        raise PlanMismatchError(
            f"{objects.place} was made from another plan; differing: {'; '.join(differing)}. "
            "Use the same options to continue it, or another --store."
        )


def check_place(objects: Objects) -> None:
    """Raise `NotAStoreError` if a place is not empty and holds no store."""
    foreign = objects.first_key()
    if foreign is not None and objects.size(layout.PLAN_KEY) is None:
        raise NotAStoreError(
            f"{objects.place} is not empty and holds no store (found {foreign!r}); "
            "choose another --store or empty it."
        )


def discard(objects: Objects, plan: Plan, shards: Iterable[int]) -> None:
    """Remove uncommitted shards, and the plan as well if nothing else is left.

    The place is then free for another plan. plan.json is removed last, so an interrupted call
    leaves an unfinished store and not a foreign folder.

    Args:
        shards: shards on which only the caller has worked.
    """
    for shard in shards:
        for key in layout.object_keys(plan, shard):
            objects.remove(key)
    if set(objects.keys("")) <= {layout.PLAN_KEY, layout.STATUS_KEY}:
        for key in (*objects.leftovers(), layout.STATUS_KEY, layout.PLAN_KEY):
            objects.remove(key)
    objects.prune()


def write_shard(objects: Objects, plan: Plan, shard: Shard) -> dict[str, Any]:
    """Publish every object of a shard and return its commit record, which is not published yet.

    An attempt that was killed before its commit may have left objects. They are adopted if they
    decode, and the record then describes them instead of the offered ones. Scale and exact rows of
    an int8 store are settled before the codes are made.
    """
    if missing := [site.name for site in plan.sites if site.name not in shard.activations]:
        raise ValueError(f"Shard {shard.number} has no activations at {', '.join(missing)}.")
    work = _Work(objects, plan, shard)
    with ThreadPoolExecutor(WRITERS) as pool:
        tokens = pool.submit(work.array, "tokens", shard.tokens)
        tables = [
            pool.submit(work.table, layout.context_key(shard.number), shard.pieces),
            pool.submit(work.table, layout.document_key(shard.number), shard.documents),
        ]
        statistics = {}
        for site, x in shard.activations.items():
            # The summary reads the rows while they are being written, and again if another
            # object was adopted.
            norms = pool.submit(work.array, f"norms/{site}", shard.norms[site])
            if plan.dtype == "int8":
                statistics[site] = work.quantized(site, x, norms.result(), tokens.result())
                continue
            stored = pool.submit(work.array, f"activations/{site}", x)
            summary = stats.summarise(x, shard.norms[site], shard.tokens)
            offered = x, shard.norms[site], shard.tokens
            there = stored.result(), norms.result(), tokens.result()
            if any(a is not b for a, b in zip(there, offered, strict=True)):
                summary = stats.summarise(*there)
            statistics[site] = summary
        for table in tables:
            table.result()
    contexts = len(shard.tokens)
    return {
        "shard": shard.number,
        "plan": plan.hash,
        "contexts": contexts,
        "rows": contexts * plan.context_length,
        "cursor": shard.cursor,
        "objects": dict(sorted(work.entries.items())),
        "statistics": statistics,
    }


class _Work:
    """The objects of one shard while they are written; `entries` is for the commit record."""

    def __init__(self, objects: Objects, plan: Plan, shard: Shard) -> None:
        self._objects, self._plan, self._shard = objects, plan, shard
        self.entries: dict[str, dict[str, Any]] = {}

    def array(self, path: str, array: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Publish one array's object and return the array, or the adopted one instead."""
        key = layout.chunk_key(path, self._shard.number)
        pieces = codec.encode(self._plan, path, array)

        def check(data: bytes) -> None:
            found = codec.decode(self._plan, path, data, len(array), key)
            if found.dtype.kind == "f" and not all_finite(found):
                raise DamagedError(f"{key} holds numbers that are not finite.")

        there = self._object(key, pieces, check)
        if there is pieces:
            return array
        return codec.decode(self._plan, path, b"".join(there), len(array), key)

    def table(self, key: str, table: pa.Table, may_differ: bool = False) -> pa.Table:
        """Publish one table's object and return the table, or the adopted one instead.

        Another version of pyarrow may write the same table in other bytes.

        Args:
            may_differ: whether the table of another attempt may have other values.
        """
        there: pa.Table | None = None

        def check(data: bytes) -> None:
            nonlocal there
            try:
                found = pq.read_table(io.BytesIO(data), page_checksum_verification=True)
            except (pa.ArrowException, OSError):
                found = None
            if (
                found is None
                or found.schema != table.schema
                or not (may_differ or found.equals(table))
            ):
                raise DamagedError(f"{key} is not the table of this shard.")
            there = found

        self._object(key, [encode_table(table)], check)
        return table if there is None else there

    def quantized(
        self,
        site: str,
        x: npt.NDArray[Any],
        norms: npt.NDArray[np.float32],
        tokens: npt.NDArray[np.int32],
    ) -> dict[str, Any]:
        """Publish the exact rows, then scale and offset, then the codes; return the statistics.

        Every attempt uses the exact rows and the scale that were published first, so the codes
        match them, whichever attempt wrote each object.
        """
        apart = quantize.rows_apart(x, stats.outlier_rows(norms))
        first = self._shard.number * self._plan.shard_rows
        exact = exact_table(np.flatnonzero(apart) + first, x[apart])
        exact = self.table(layout.exact_key(site, self._shard.number), exact, may_differ=True)
        apart = np.zeros(len(x), np.bool_)
        apart[exact["row"].to_numpy() - first] = True
        offered = quantize.calibrate(x, apart)  # [2, width], scale and offset
        scale, offset = self.array(f"quantization/{site}", offered[np.newaxis])[0]
        codes = quantize.encode(x, apart, scale, offset)
        codes = self.array(f"activations/{site}", codes)
        stored = quantize.decode(codes, scale, offset)
        stored[apart] = exact_values(exact, x.shape[1])
        return stats.summarise(stored, norms, tokens) | {
            "quantization_error": stats.squared_error(x, stored)
        }

    def _object(self, key: str, pieces: Pieces, check: Check) -> Pieces:
        there = publish_or_adopt(self._objects, key, pieces, check)
        entry: dict[str, Any] = {"bytes": total_bytes(there), "xxh3": content_hash(there)}
        if path := layout.array_path(key):
            length = codec.entries(self._plan, path, len(self._shard.tokens))
            entry["chunks"] = codec.checksums(self._plan, path, there, length)
        self.entries[key] = entry
        return there


def publish_or_adopt(objects: Objects, key: str, pieces: Pieces, check: Check) -> Pieces:
    """Publish an object, or adopt an existing one that decodes. Return the stored pieces."""
    if objects.publish(key, pieces):
        return pieces
    there = objects.read(key)
    if content_hash([there]) == content_hash(pieces):
        return pieces
    with contextlib.suppress(DamagedError):
        check(there)
        return [there]
    # Not committed and not decodable: a disk fault. Our object replaces it.
    objects.replace(key, pieces)
    return pieces
