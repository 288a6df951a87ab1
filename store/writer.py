"""Writing a store: create it, publish a shard's objects, commit the shard, seal the whole.

The order makes it safe to be killed anywhere: objects first, then the commit record that lists
them, and sealed.json once every shard is committed. Nothing is ever overwritten.
"""

from __future__ import annotations

import contextlib
import io
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import zarr
from zarr.core.buffer import default_buffer_prototype
from zarr.core.sync import sync
from zarr.storage import MemoryStore

from store import layout, stats
from store.errors import DamagedError, NotAStoreError, PlanMismatchError
from store.layout import Plan
from store.objects import TEMPORARY_SUFFIX, content_hash, leftovers, publish
from store.records import canonical, decode_record, digest_of, encode_record


@dataclass(frozen=True, slots=True)
class Shard:
    """What a worker made of one shard of the plan.

    tokens int32 [contexts, context_length]; activations and norms per site, [rows, width] in
    the stored dtype and float32 [rows]; contexts and documents are the two small tables.
    """

    number: int
    tokens: npt.NDArray[np.int32]
    contexts: pa.Table
    documents: pa.Table
    activations: dict[str, npt.NDArray[Any]]
    norms: dict[str, npt.NDArray[np.float32]]


def create_store(root: Path, plan: Plan, made_with: dict[str, str]) -> Plan:
    """Create the store, or adopt the one that is there if it was made from an equal plan.

    Args:
        made_with: versions of the libraries, kept for provenance; not part of the identity.

    Raises:
        NotAStoreError: the folder holds something else.
        PlanMismatchError: it holds a store of another plan; names the differing fields.
    """
    check_folder(root)
    record: dict[str, Any] = {
        "plan": plan.model_dump(mode="json"),
        "hash": plan.hash,
        "made_with": made_with,
        "zarr": layout.zarr_metadata(plan),
    }
    publish(root, layout.PLAN_KEY, encode_record(record))
    record = read_plan_record(root)
    existing = Plan.model_validate(record["plan"])
    if differing := existing.differing_fields(plan):
        raise PlanMismatchError(
            f"{root} was made from another plan; differing: {'; '.join(differing)}. "
            "Use the same options to continue it, or another --store."
        )
    for key, content in record["zarr"].items():
        publish(root, key, canonical(content))
    return existing


def check_folder(root: Path) -> None:
    """`NotAStoreError` if a store can't be made at `root` because something else is there."""
    if not root.exists() or (root / layout.PLAN_KEY).exists():
        return
    if not root.is_dir():
        raise NotAStoreError(f"{root} is a file; --store takes a folder.")
    killed = set(root.glob(f".*{TEMPORARY_SUFFIX}"))
    foreign = sorted(p.name for p in root.iterdir() if p not in killed)
    if foreign:
        raise NotAStoreError(
            f"{root} is not empty and holds no store (found {foreign[0]!r}); "
            "choose another --store or empty it."
        )


def discard(root: Path) -> None:
    """Remove a store in which nothing is committed, so that another plan can take its place.

    plan.json goes last: killed before, this leaves an unfinished store, not a foreign folder.
    """
    for folder in layout.FOLDERS:
        with contextlib.suppress(FileNotFoundError):
            shutil.rmtree(root / folder)
    for path in (*leftovers(root), root / "zarr.json", root / layout.PLAN_KEY):
        path.unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # somebody else's file beside ours stays
        root.rmdir()


def read_plan_record(root: Path) -> dict[str, Any]:
    """The checked content of plan.json: plan, hash, made_with, zarr.

    Raises:
        NotAStoreError: no plan.json.
        DamagedError: it is damaged, or of a format this version does not know.
    """
    try:
        data = (root / layout.PLAN_KEY).read_bytes()
    except OSError:
        raise NotAStoreError(
            f"{root} holds no activation store (no {layout.PLAN_KEY} there); "
            "give the folder that `harvest run --store` wrote."
        ) from None
    record = decode_record(data, f"{root}/{layout.PLAN_KEY}")
    if not isinstance(record.get("plan"), dict):
        raise DamagedError(f"{root}/{layout.PLAN_KEY} is damaged: it is another kind of record.")
    found = record["plan"].get("format")
    if found != layout.FORMAT:
        raise DamagedError(
            f"{root} is a store of format {found}, this version reads {layout.FORMAT}; "
            "use the version of sae-harvest that wrote it."
        )
    return record


def write_shard(root: Path, plan: Plan, shard: Shard) -> dict[str, Any]:
    """Publish every object of a shard and return its commit record, not yet published.

    An object that is already there, from an attempt that was killed before its commit, is
    adopted if it decodes; the statistics then describe what is there, not what was offered.
    """
    contexts = plan.shard_contexts(shard.number)
    arrays: dict[str, npt.NDArray[Any]] = {"tokens": shard.tokens}
    arrays |= {f"activations/{site}": x for site, x in shard.activations.items()}
    arrays |= {f"norms/{site}": norms for site, norms in shard.norms.items()}
    objects: dict[str, Any] = {}
    for path, array in arrays.items():
        offered = _encode(plan, path, shard.number, array)
        there = _publish_or_adopt(root, plan, path, shard.number, offered)
        if there is not offered:
            arrays[path] = _decode(plan, path, shard.number, there)
        objects[layout.chunk_key(path, shard.number)] = _entry(there)
    for key, table in (
        (layout.context_key(shard.number), shard.contexts),
        (layout.document_key(shard.number), shard.documents),
    ):
        objects[key] = _entry(_publish_or_adopt_table(root, key, table))
    return {
        "shard": shard.number,
        "plan": plan.hash,
        "contexts": contexts[1] - contexts[0],
        "rows": (contexts[1] - contexts[0]) * plan.context_length,
        "objects": objects,
        "statistics": {
            site: stats.summarise(
                arrays[f"activations/{site}"], arrays[f"norms/{site}"], arrays["tokens"]
            )
            for site in shard.activations
        },
    }


def commit_shard(root: Path, record: dict[str, Any]) -> dict[str, Any]:
    """Publish a commit record; the one that is there wins and is returned."""
    key = layout.commit_key(record["shard"])
    if publish(root, key, encode_record(record)):
        return record
    return decode_record((root / key).read_bytes(), f"{root}/{key}")


def committed_shards(root: Path, plan: Plan) -> list[int]:
    """Numbers of the committed shards, ascending."""
    return [u for u in range(plan.n_shards) if (root / layout.commit_key(u)).exists()]


def read_commit(root: Path, plan: Plan, shard: int) -> dict[str, Any]:
    """The checked commit record of a shard; `DamagedError` if missing, altered or foreign."""
    key = layout.commit_key(shard)
    try:
        data = (root / key).read_bytes()
    except FileNotFoundError:
        raise DamagedError(
            f"{root}/{key} is missing: shard {shard} is not there; run the same harvest again."
        ) from None
    record = decode_record(data, f"{root}/{key}")
    if record["plan"] != plan.hash or record["shard"] != shard:
        raise DamagedError(f"{root}/{key} belongs to another store or shard.")
    return record


def seal(root: Path, plan: Plan) -> str:
    """Publish sealed.json from the commit records and return the store's digest.

    The digest covers the plan and the hash of every object, nothing that varies between two
    runs of one plan.
    """
    commits = [read_commit(root, plan, shard) for shard in range(plan.n_shards)]
    digest = store_digest(plan, commits)
    record = {
        "digest": digest,
        "plan": plan.hash,
        "rows": sum(c["rows"] for c in commits),
        "contexts": sum(c["contexts"] for c in commits),
        "bytes": sum(o["bytes"] for c in commits for o in c["objects"].values()),
        "statistics": {
            s.name: stats.merge(c["statistics"][s.name] for c in commits) for s in plan.sites
        },
    }
    data = encode_record(record)
    if not publish(root, layout.SEALED_KEY, data):
        there = decode_record((root / layout.SEALED_KEY).read_bytes(), f"{root}/sealed.json")
        if there["digest"] != digest:
            raise DamagedError(f"{root}/sealed.json does not match the commits beside it.")
    for path in leftovers(root):  # of killed writers; every shard is committed, none is needed
        with contextlib.suppress(FileNotFoundError):
            path.unlink()
    return digest


def store_digest(plan: Plan, commits: list[dict[str, Any]]) -> str:
    """xxh3-128 over the plan's hash and the objects of every commit."""
    return digest_of([plan.hash, [c["objects"] for c in commits]])


def _entry(data: bytes) -> dict[str, Any]:
    return {"bytes": len(data), "xxh3": content_hash(data)}


def _publish_or_adopt(root: Path, plan: Plan, path: str, shard: int, data: bytes) -> bytes:
    key = layout.chunk_key(path, shard)
    if publish(root, key, data):
        return data
    there = (root / key).read_bytes()
    if there == data:
        return data
    if len(there) == len(data):  # nothing is compressed; zarr reads an empty object as fill values
        with contextlib.suppress(DamagedError):
            _decode(plan, path, shard, there)
            return there
    # Not committed and not decodable: a disk fault, not data. Ours takes its place.
    return _replace(root, key, data)


def _publish_or_adopt_table(root: Path, key: str, table: pa.Table) -> bytes:
    data = _encode_table(table)
    if publish(root, key, data):
        return data
    there = (root / key).read_bytes()
    if there == data:
        return data
    # Another version of pyarrow writes the same table in other bytes.
    with contextlib.suppress(pa.ArrowException, OSError):
        if pq.read_table(io.BytesIO(there)).equals(table):
            return there
    return _replace(root, key, data)


def _replace(root: Path, key: str, data: bytes) -> bytes:
    (root / key).unlink()
    publish(root, key, data)
    return data


def _rows(plan: Plan, path: str, shard: int) -> slice:
    first, last = plan.shard_contexts(shard)
    length = 1 if path == "tokens" else plan.context_length
    return slice(first * length, last * length)


def _encode(plan: Plan, path: str, shard: int, array: npt.NDArray[Any]) -> bytes:
    """The bytes that zarr writes for one shard of one array."""
    memory = MemoryStore()
    spec = layout.array_specs(plan)[path]
    target = zarr.create_array(memory, name=path, config={"write_empty_chunks": True}, **spec)
    target[_rows(plan, path, shard)] = array
    buffer = sync(memory.get(layout.chunk_key(path, shard), default_buffer_prototype()))
    assert buffer is not None
    return buffer.to_bytes()


def _decode(plan: Plan, path: str, shard: int, data: bytes) -> npt.NDArray[Any]:
    """The array in one shard's bytes; `DamagedError` if zarr cannot read it whole."""
    memory = MemoryStore()
    target = zarr.create_array(memory, name=path, **layout.array_specs(plan)[path])
    buffer = default_buffer_prototype().buffer.from_bytes(data)
    sync(memory.set(layout.chunk_key(path, shard), buffer))
    try:
        return np.asarray(target[_rows(plan, path, shard)])
    except (ValueError, RuntimeError, TypeError, IndexError) as error:
        raise DamagedError(f"{layout.chunk_key(path, shard)} does not decode: {error}") from error


def _encode_table(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    return sink.getvalue().to_pybytes()
