"""A store made of random numbers through the public writer, for tests that need no model."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa

from sae_harvest.store import codec, layout
from sae_harvest.store.commits import commit_shard, read_commit
from sae_harvest.store.layout import Plan, SitePlan
from sae_harvest.store.maintenance.repair import reseal
from sae_harvest.store.objects import LocalObjects, Objects, content_hash
from sae_harvest.store.records import encode_record
from sae_harvest.store.seals import seal
from sae_harvest.store.tables import DOCUMENT_SCHEMA, PIECE_SCHEMA
from sae_harvest.store.writer import Shard, create_store, write_shard

SITE = "resid_post.0"
OTHER = "mlp_act.0"
CONTEXTS = 100  # 12 shards of 8 contexts of 16 tokens and one of 4, where the corpus ends


def make_plan(width: int = 8, seed: int = 0, dtype: str = "float16") -> Plan:
    """Shards of 8 contexts of 16 tokens."""
    return Plan.model_validate(
        {
            "model": {"name": "none", "weights": "none"},
            "tokenizer": {},
            "corpus": {"name": "none"},
            "sites": (SitePlan(name=SITE, width=width),),
            "context_length": 16,
            "contexts_per_shard": 8,
            "bos": "none",
            "seed": seed,
            "window_contexts": 64,
            "document_text": False,
            "dtype": dtype,
            "compute_dtype": "float32",
            "batch_contexts": 4,
        }
    )


def rows_of(plan: Plan, n_contexts: int = CONTEXTS) -> np.ndarray:
    """The float32 activations [rows, width] of the first contexts; position 0 is massive."""
    shape = n_contexts * plan.context_length, plan.width(SITE)
    x = np.random.default_rng(plan.seed).standard_normal(shape)
    x[:: plan.context_length] *= 100
    return x.astype(np.float32)


def make_shard(plan: Plan, number: int, n_contexts: int = CONTEXTS, noise: float = 0) -> Shard:
    """A shard of a corpus that ends after `n_contexts`; each context is one document of its own.

    noise: relative, on every row, as another processor or batch shape would make it.
    """
    first = number * plan.contexts_per_shard
    last = min(first + plan.contexts_per_shard, n_contexts)
    length = plan.context_length
    x = rows_of(plan, last)[first * length :] * np.float32(1 + noise)
    contexts = np.arange(first, last)
    hashes = contexts.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    count = len(contexts)
    pieces = pa.table(
        {
            "context": contexts,
            "start": np.zeros(count),
            "stop": np.full(count, length),
            "document": contexts,
            "document_hash": hashes,
            "first_token": np.zeros(count),
            "char_start": np.zeros(count),
            "char_end": np.full(count, 50),
        },
        PIECE_SCHEMA,
    )
    documents = pa.table(
        {
            "document": contexts,
            "id": [f"d{c}" for c in contexts],
            "source": ["made up"] * count,
            "title": [None] * count,
            "url": [None] * count,
            "text_hash": hashes,
            "n_chars": np.full(count, 50),
            "n_tokens": np.full(count, length - 1),
        },
        DOCUMENT_SCHEMA,
    )
    tokens = np.arange(first * length, last * length, dtype=np.int32).reshape(-1, length)
    norms = np.linalg.norm(x, axis=1)
    dtype = "float16" if plan.dtype == "int8" else plan.dtype
    cursor = {"document": first}
    return Shard(number, tokens, pieces, documents, {SITE: x.astype(dtype)}, {SITE: norms}, cursor)


def add_shards(
    objects: Objects, plan: Plan, numbers: Iterable[int], n_contexts: int = CONTEXTS
) -> None:
    """Write and commit shards."""
    for number in numbers:
        commit_shard(objects, write_shard(objects, plan, make_shard(plan, number, n_contexts)))


def make_store(place: Path | Objects, plan: Plan | None = None, n_contexts: int = CONTEXTS) -> Plan:
    """Create, write, commit and seal; what is there already is kept."""
    objects = LocalObjects(place) if isinstance(place, Path) else place
    plan = plan or make_plan()
    create_store(objects, plan, {})
    n_shards = -(-n_contexts // plan.contexts_per_shard)
    add_shards(objects, plan, range(n_shards), n_contexts)
    seal(objects, plan, n_shards)
    return plan


def make_two_sites(root: Path, shards: int) -> None:
    """SITE and a wider OTHER; chunks of 128 and of 32 rows. OTHER has massive rows of its own."""
    plan = make_plan().model_copy(
        update={"sites": (SitePlan(name=SITE, width=8), SitePlan(name=OTHER, width=24))}
    )
    objects = LocalObjects(root)
    create_store(objects, plan, {})
    for number in range(shards):
        shard = make_shard(plan, number)
        y = other_rows(number)
        activations = {**shard.activations, OTHER: y.astype(np.float16)}
        norms = {**shard.norms, OTHER: np.linalg.norm(y, axis=1)}
        shard = replace(shard, activations=activations, norms=norms)
        commit_shard(objects, write_shard(objects, plan, shard))
    seal(objects, plan, shards)


def other_rows(number: int) -> np.ndarray:
    """The float32 rows [128, 24] of OTHER in a shard; position 5 of each context is massive."""
    y = np.random.default_rng(number).standard_normal((128, 24)).astype(np.float32)
    y[5::16] *= 100
    return y


def replace_array(objects: Objects, plan: Plan, path: str, shard: int, x: np.ndarray) -> None:
    """Put another array into a sealed shard and make all records fit.

    It is another store then, by its digest. `x` may hold what no harvest writes.
    """
    key, pieces = layout.chunk_key(path, shard), codec.encode(plan, path, x)
    objects.replace(key, pieces)
    record = read_commit(objects, plan, shard)
    record["objects"][key] |= {
        "xxh3": content_hash(pieces),
        "chunks": codec.checksums(plan, path, pieces, len(x)),
    }
    objects.replace(layout.commit_key(shard), [encode_record(record)])
    reseal(objects, plan)
