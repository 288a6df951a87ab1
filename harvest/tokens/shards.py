"""The text of the requested shards, read from the nearest place that the store has recorded."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from sae_harvest.common.errors import DamagedError
from sae_harvest.harvest.run.prepare import ALL_SHARDS, Prepared
from sae_harvest.harvest.tokens.contexts import iter_shards
from sae_harvest.store import layout
from sae_harvest.store.commits import committed_shards, load_commit, place_in_corpus, read_object
from sae_harvest.store.layout import Plan
from sae_harvest.store.objects import Objects
from sae_harvest.store.seals import trusted_commits
from sae_harvest.store.tables import parse_table
from sae_harvest.store.writer import Shard


def missing(done: Sequence[int], span: range) -> list[range]:
    """Return the shards of a span that are not done, as runs; `done` is ascending."""
    ranges = []
    begin = span.start
    for shard in done:
        if shard >= span.stop:
            break
        if shard > begin:
            ranges.append(range(begin, shard))
        begin = max(begin, shard + 1)
    return [*ranges, range(begin, span.stop)] if begin < span.stop else ranges


def runs(shards: Sequence[int]) -> list[range]:
    """Group ascending numbers into runs of consecutive ones."""
    breaks = [i for i, (a, b) in enumerate(pairwise(shards), start=1) if b != a + 1]
    borders = pairwise([0, *breaks, len(shards)]) if shards else ()
    return [range(shards[i], shards[j - 1] + 1) for i, j in borders]


def shard_inputs(
    prepared: Prepared,
    objects: Objects,
    plan: Plan | None,
    shard_ranges: Sequence[range],
    n_shards: int,
) -> Iterator[Shard]:
    """Yield token ids and tables of some shards, in order.

    Every commit record holds the place in the corpus where the shard's text begins, so that reading
    starts there, not at the corpus' first document.

    Args:
        plan: plan of the existing store; None if there is none yet.
        shard_ranges: the shards to read, ascending.
        n_shards: shards of the whole harvest, `ALL_SHARDS` for all that the corpus fills; fewer
            are fine if the corpus ends with them and holds the tokens asked for.
    """
    settings = prepared.settings
    store = None if plan is None else _Committed(objects, plan, prepared.corpus.dedup)
    per_window = -(-settings.window_contexts // settings.contexts_per_shard)
    if n_shards == ALL_SHARDS and shard_ranges:
        n_shards = shard_ranges[-1].stop
    for group in _groups(shard_ranges, 2 * per_window):
        first = group[0].start
        cursor, seen_hashes = (None, []) if store is None else store.start(first)
        shards = iter_shards(
            prepared.corpus,
            prepared.tokenizer,
            settings.context_length,
            settings.bos,
            settings.seed,
            contexts_per_shard=settings.contexts_per_shard,
            n_shards=n_shards,
            at_least=prepared.min_contexts,
            window_contexts=settings.window_contexts,
            first_shard=first,
            cursor=cursor,
            seen_hashes=seen_hashes,
            keep_text=settings.document_text,
        )
        todo = list(reversed(group))
        for shard in shards:
            while todo and shard.number >= todo[-1].stop:
                todo.pop()
            if todo and shard.number in todo[-1]:
                yield shard
            if shard.number + 1 >= group[-1].stop and group[-1] != shard_ranges[-1]:
                break


def _groups(shard_ranges: Sequence[range], gap: int) -> Iterator[list[range]]:
    """Yield groups of runs that are at most `gap` shards apart; reading starts anew per group."""
    group = list(shard_ranges[:1])
    for before, run in pairwise(shard_ranges):
        if run.start - before.stop >= gap:
            yield group
            group = []
        group.append(run)
    if group:
        yield group


class _Committed:
    """The places in a corpus where the text of a store's shards begins.

    Args:
        dedup: whether repeated documents are left out.
    """

    def __init__(self, objects: Objects, plan: Plan, dedup: bool) -> None:
        self._objects, self._plan, self._dedup = objects, plan, dedup
        self._shards = committed_shards(objects)
        self._sealed = trusted_commits(objects, plan)
        self._listed: list[tuple[npt.NDArray[np.int64], npt.NDArray[np.uint64]]] = []

    def start(self, first: int) -> tuple[dict[str, Any] | None, list[npt.NDArray[np.uint64]]]:
        """Return the cursor to read a shard's text from, and the hashes of the texts before it."""
        cursor = None
        for shard in reversed(self._shards[: bisect_right(self._shards, first)]):
            try:
                cursor = place_in_corpus(self._commit(shard))
                break
            except DamagedError:  # a repair restores these; an earlier start gives the same text
                continue
        if cursor is None or not self._dedup:
            return cursor, []
        try:
            return cursor, self._hashes_before(first, cursor["document"])
        except DamagedError:  # the texts before are not known for sure: start at the beginning
            return None, []

    def _commit(self, shard: int) -> dict[str, Any]:
        sealed = self._sealed[shard] if shard < len(self._sealed) else None
        return load_commit(self._objects, self._plan, shard, sealed)[0]

    def _hashes_before(self, first: int, document: int) -> list[npt.NDArray[np.uint64]]:
        """Return text hashes of all documents below a number, listed in shards before `first`."""
        for shard in range(len(self._listed), first):
            key = layout.document_key(shard)
            data = read_object(self._objects, key, self._commit(shard)["objects"][key])
            table = parse_table(data, self._plan, key, shard, f"{self._objects.place}/{key}")
            self._listed.append((table["document"].to_numpy(), table["text_hash"].to_numpy()))
        return [hashes[documents < document] for documents, hashes in self._listed[:first]]
