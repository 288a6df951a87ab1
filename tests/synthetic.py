"""A store made of random numbers through the public writer, for tests that need no model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa

from store.layout import Plan, SitePlan
from store.writer import Shard, commit_shard, create_store, seal, write_shard

SITE = "resid_post.0"


def make_plan(n_contexts: int = 100, width: int = 8, seed: int = 0, dtype: str = "float16") -> Plan:
    """13 shards of 8 contexts of 16 tokens, the last one short."""
    return Plan.model_validate(
        {
            "model": {"name": "none", "weights": "none"},
            "tokenizer": {},
            "corpus": {"name": "none"},
            "sites": (SitePlan(name=SITE, width=width),),
            "context_length": 16,
            "n_contexts": n_contexts,
            "contexts_per_shard": 8,
            "bos": "none",
            "seed": seed,
            "window_contexts": 64,
            "dtype": dtype,
            "compute_dtype": "float32",
            "batch_contexts": 4,
        }
    )


def rows_of(plan: Plan) -> np.ndarray:
    """The float32 activations [rows, width] of the whole store; position 0 is massive."""
    x = np.random.default_rng(plan.seed).standard_normal((plan.n_rows, plan.width(SITE)))
    x[:: plan.context_length] *= 100
    return x.astype(np.float32)


def make_shard(plan: Plan, number: int) -> Shard:
    """Each context is one document of its own."""
    first, last = plan.shard_contexts(number)
    length = plan.context_length
    x = rows_of(plan)[first * length : last * length]
    contexts = np.arange(first, last)
    hashes = contexts.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    pieces = pa.table(
        {
            "context": pa.array(contexts, pa.int64()),
            "start": pa.array(np.zeros(len(contexts)), pa.int32()),
            "stop": pa.array(np.full(len(contexts), length), pa.int32()),
            "document": pa.array(contexts, pa.int64()),
            "document_hash": pa.array(hashes, pa.uint64()),
            "first_token": pa.array(np.zeros(len(contexts)), pa.int64()),
            "char_start": pa.array(np.zeros(len(contexts)), pa.int64()),
            "char_end": pa.array(np.full(len(contexts), 50), pa.int64()),
        }
    )
    documents = pa.table({"document": contexts, "id": [f"d{c}" for c in contexts]})
    tokens = np.arange(first * length, last * length, dtype=np.int32).reshape(-1, length)
    norms = np.linalg.norm(x, axis=1)
    return Shard(number, tokens, pieces, documents, {SITE: x.astype(plan.dtype)}, {SITE: norms})


def make_store(root: Path, plan: Plan | None = None) -> Plan:
    """Create, write, commit and seal."""
    plan = plan or make_plan()
    create_store(root, plan, {})
    for number in range(plan.n_shards):
        commit_shard(root, write_shard(root, plan, make_shard(plan, number)))
    seal(root, plan)
    return plan
