"""A cache of delphi's as the first half of a feature build: firings and rows, ready to be counted.

Nothing is known of documents: each context is taken for one, and told apart for explaining and
scoring by its tokens. Activations are as delphi has rounded them, to float16.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import xxhash

from pipelines.exports.delphi_cache import DelphiCache
from pipelines.features import rows
from pipelines.features.firings import Blocks, publish
from store.objects import LocalObjects

BLOCK_FIRINGS = 1 << 22  # of a block, about


def write_firings(cache: DelphiCache, out: Path) -> Blocks:
    """Write OUT/firings; blocks that are there already stay."""
    per_context = max(1, -(-cache.n_firings // len(cache.tokens)))
    n_contexts = max(1, BLOCK_FIRINGS // per_context)
    objects = LocalObjects(out)
    for block, firings in enumerate(cache.blocks(n_contexts)):
        publish(objects, block, firings)
    return Blocks(out, cache.n_rows, n_contexts * cache.context_length, cache.n_latents)


def write_rows(cache: DelphiCache, out: Path) -> rows.Rows:
    """Write OUT/rows anew."""
    contexts = np.arange(len(cache.tokens))
    hashes = np.array(
        [xxhash.xxh3_64_intdigest(context.tobytes()) for context in cache.tokens], np.uint64
    )
    split = rows.for_scores(hashes) * np.uint8(rows.SCORE) | np.uint8(rows.READ)
    columns: dict[str, npt.NDArray[np.generic]] = {
        "token": cache.tokens.reshape(-1),
        "document": np.repeat(contexts, cache.context_length),
        "split": np.repeat(split, cache.context_length),
    }
    (out / rows.FOLDER).mkdir(parents=True, exist_ok=True)
    for name, dtype in rows.COLUMNS.items():
        np.save(out / rows.FOLDER / f"{name}.npy", columns[name].astype(dtype))
    return rows.Rows(out)


def documents_table(cache: DelphiCache) -> pa.Table:
    """One per context, called after the cache's folder."""
    n = len(cache.tokens)
    return pa.table(
        {
            "document": np.arange(n),
            "source": pa.array([cache.folder.name] * n, pa.string()),
            "title": pa.nulls(n, pa.string()),
            "url": pa.nulls(n, pa.string()),
        }
    )
