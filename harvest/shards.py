"""The text of the shards that are wanted, read from as near to each as the store remembers."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from harvest.contexts import ShardInput, iter_shards
from harvest.prepare import Prepared
from store import layout
from store.errors import DamagedError
from store.layout import Plan
from store.objects import Objects
from store.writer import committed_shards, read_commit, read_object


def shard_inputs(
    prepared: Prepared, objects: Objects, plan: Plan | None, wanted: Sequence[int], n_shards: int
) -> Iterator[ShardInput]:
    """Token ids and tables of some shards, in order.

    Every commit record tells where in the corpus its text begins, so that reading starts there,
    not at the corpus' first document.

    Args:
        plan: of the store that is there, None if there is none yet.
        wanted: shard numbers, ascending.
        n_shards: shards of the whole harvest; fewer are fine if the corpus ends with them and
            holds the tokens asked for.
    """
    fields = prepared.fields
    names = ("context_length", "bos", "seed", "window_contexts", "contexts_per_shard")
    arguments = {name: fields[name] for name in names}
    committed = committed_shards(objects) if plan else []
    per_window = -(-fields["window_contexts"] // fields["contexts_per_shard"])
    for group in _groups(wanted, 2 * per_window):
        cursor, seen = _start(prepared, objects, plan, group[0], committed)
        chosen = set(group)
        shards = iter_shards(
            prepared.corpus,
            prepared.tokenizer,
            **arguments,
            n_shards=n_shards,
            at_least=prepared.least_contexts,
            first_shard=group[0],
            cursor=cursor,
            seen=seen,
            keep_text=fields["document_text"],
        )
        for shard in shards:
            if shard.shard in chosen:
                yield shard
            if shard.shard >= group[-1] and group[-1] != wanted[-1]:
                break


def _groups(wanted: Sequence[int], gap: int) -> Iterator[list[int]]:
    """Runs of shards at most `gap` apart from neighbour to neighbour: each is worth a new start."""
    group = list(wanted[:1])
    for before, shard in pairwise(wanted):
        if shard - before > gap:
            yield group
            group = []
        group.append(shard)
    if group:
        yield group


def _start(
    prepared: Prepared, objects: Objects, plan: Plan | None, first: int, committed: list[int]
) -> tuple[dict[str, Any] | None, list[npt.NDArray[np.uint64]]]:
    """Where to start reading for a shard, and the hashes of the texts before that."""
    if plan is None:
        return None, []
    cursor = None
    for shard in reversed([u for u in committed if u <= first]):
        try:
            cursor = read_commit(objects, plan, shard)["cursor"]
            break
        except DamagedError:  # a repair mends them; an earlier start serves as well
            continue
    if cursor is None or not prepared.config.corpus.dedup:
        return cursor, []
    try:
        return cursor, _hashes_before(objects, plan, first, cursor["document"])
    except DamagedError:  # what was seen before is not known for sure: start from the beginning
        return None, []


def _hashes_before(
    objects: Objects, plan: Plan, first: int, document: int
) -> list[npt.NDArray[np.uint64]]:
    """Text hashes of all documents below a number, from the tables of the shards before `first`."""
    hashes = []
    for shard in range(first):
        key = layout.document_key(shard)
        entry = read_commit(objects, plan, shard)["objects"][key]
        data = read_object(objects, key, entry)
        table: pa.Table = pq.read_table(io.BytesIO(data), columns=["document", "text_hash"])
        hashes.append(table["text_hash"].to_numpy()[table["document"].to_numpy() < document])
    return hashes
