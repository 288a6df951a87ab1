"""Rows on which one latent of a pair fires and the other does not, with the text around them.

    A only          the latent of A fires, that of B does not
    B only          the other way round
    parent silent   of absorbed pairs: the child fires, and its parent, in the same dictionary, does
                    not

The rows are those with the highest activations, in different contexts. A latent that died or was
born has them from all its firings.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from sae_harvest.pipelines.evaluate.matching import kernels
from sae_harvest.pipelines.evaluate.matching.classes import (
    ABSORBED,
    BORN,
    CHILD_A,
    CHILD_B,
    CHILDREN,
    CLASSES,
    DIED,
    NONE,
    Pairs,
)
from sae_harvest.pipelines.evaluate.matching.joint import Ints
from sae_harvest.pipelines.evaluate.matching.spans import Span, Spans
from sae_harvest.pipelines.evaluate.matching.table import DISAGREEMENTS_SCHEMA
from sae_harvest.pipelines.features.counting.kernels import cut_windows
from sae_harvest.pipelines.features.encoding.firings import Firings
from sae_harvest.pipelines.features.tables.contexts import WINDOW_BEFORE, lists
from sae_harvest.pipelines.features.tables.texts import TokenTexts
from sae_harvest.store.reader import ActivationStore

PLACES = 2  # rows of a pair and kind
WINDOW = 32  # tokens of a text
AT_ONCE = 1 << 16  # texts in memory at a time
KINDS = ("A only", "B only", "parent silent")


@dataclass(frozen=True, eq=False)
class Rows:
    """Rows on which a pair disagrees, sorted as the pairs, then by kind and rank."""

    pair: Ints
    """[rows], place of the pair."""

    kind: Ints
    """[rows], index in KINDS."""

    rank: Ints
    """[rows], from 0, by falling activation."""

    row: Ints
    """[rows], numbers of rows in the store."""

    def __len__(self) -> int:
        return len(self.row)


def disagreements(spans: Spans, pairs: Pairs) -> Rows:
    """Find the rows on which pairs disagree most; the firings are read once."""
    asked = list(_asked(pairs))
    best = [
        (np.full((len(places), PLACES), -1), np.zeros((len(places), PLACES), np.float32))
        for _, places, *_ in asked
    ]
    length = spans.rows.context_length
    for span in spans:
        for (_, _, own, latent, other_side, other), kept in zip(asked, best, strict=True):
            mine, against = _of(span, own), _of(span, other_side)
            kernels.keep_strongest(
                span.first, length, mine.starts, mine.row, mine.value, against.starts,
                against.row, latent, other, *kept,
            )  # fmt: skip
    pair = np.concatenate([np.repeat(places, PLACES) for _, places, *_ in asked])
    kind = np.concatenate([np.full(len(places) * PLACES, kind) for kind, places, *_ in asked])
    rank = np.concatenate([np.tile(np.arange(PLACES), len(places)) for _, places, *_ in asked])
    row = np.concatenate([rows.reshape(-1) for rows, _ in best])
    order = np.lexsort((rank, kind, pair))
    order = order[row[order] >= 0]
    return Rows(pair[order], kind[order], rank[order], row[order])


def _asked(pairs: Pairs) -> Iterator[tuple[int, Ints, str, Ints, str, Ints]]:
    """Yield kind, places of pairs, and the two latents: which fires, and which does not."""
    everything = np.arange(len(pairs))
    mine = everything[pairs.kind != BORN]
    yield 0, mine, "a", pairs.a[mine], "b", pairs.b[mine]
    theirs = everything[pairs.kind != DIED]
    yield 1, theirs, "b", pairs.b[theirs], "a", pairs.a[theirs]
    for side, child in (("a", CHILD_A), ("b", CHILD_B)):
        some = everything[(pairs.kind == ABSORBED) & (pairs.child == child)]
        yield 2, some, side, getattr(pairs, side)[some], side, pairs.parent[some]


def disagreement_tables(
    spans: Spans, pairs: Pairs, rows: Rows, store: ActivationStore, texts: TokenTexts
) -> Iterator[pa.Table]:
    """Yield the table of rows with their texts, some at a time; each time firings are read once."""
    for first in range(0, len(rows), AT_ONCE):
        here = slice(first, first + AT_ONCE)
        some = Rows(rows.pair[here], rows.kind[here], rows.rank[here], rows.row[here])
        yield _table(spans, pairs, some, store, texts)


def _table(
    spans: Spans, pairs: Pairs, rows: Rows, store: ActivationStore, texts: TokenTexts
) -> pa.Table:
    length = store.context_length
    window = min(WINDOW, length)
    position = rows.row % length
    start = np.clip(position - int(window * WINDOW_BEFORE), 0, length - window)
    begin = rows.row - position + start
    latents = {"a": pairs.a[rows.pair], "b": pairs.b[rows.pair]}
    activations = {name: np.zeros((len(rows), window), np.float32) for name in latents}
    for span in spans:
        inside = (begin >= span.first) & (begin < span.last)
        for name, latent in latents.items():
            at = np.flatnonzero(inside & (latent != NONE))
            found = _of(span, name)
            cut_windows(
                found.starts, found.row, found.value, latent[at], begin[at] - span.first, at,
                window, activations[name],
            )  # fmt: skip
    ids = _tokens(store, begin, window)
    text, ends = texts.windows(ids)
    columns = {
        "pair": rows.pair,
        "latent_a": _nullable(latents["a"]),
        "latent_b": _nullable(latents["b"]),
        "class": pa.array(CLASSES).take(pa.array(pairs.kind[rows.pair])),
        "child": pa.array(CHILDREN, pa.string()).take(pa.array(pairs.child[rows.pair])),
        "kind": pa.array(KINDS).take(pa.array(rows.kind)),
        "rank": rows.rank.astype(np.int16),
        "row": rows.row,
        "context": rows.row // length,
        "document": _documents(store, rows.row),
        "position": position.astype(np.int32),
        "window_start": start.astype(np.int32),
        "token_ids": lists(pa.array(ids.reshape(-1)), ids.shape),
        "token_ends": lists(pa.array(ends.reshape(-1)), ids.shape),
    }
    for name, found_activations in activations.items():
        flat = pa.array(found_activations.reshape(-1))
        columns[f"activations_{name}"] = lists(flat, found_activations.shape)
    return pa.Table.from_pydict(columns | {"text": text}, DISAGREEMENTS_SCHEMA)


def _of(span: Span, side: str) -> Firings:
    return span.a if side == "a" else span.b


def _nullable(latents: Ints) -> pa.Array:
    return pa.array(latents.astype(np.int32), mask=latents == NONE)


def _tokens(store: ActivationStore, begin: Ints, window: int) -> npt.NDArray[np.int32]:
    """Return the token ids of windows, int32 [windows, window]."""
    contexts, place = np.unique(begin // store.context_length, return_inverse=True)
    inside = (begin % store.context_length)[:, None] + np.arange(window)
    per_shard = store.shard_rows // store.context_length
    found = np.empty((len(contexts), store.context_length), np.int32)
    for shard in np.unique(contexts // per_shard).tolist():
        here = contexts // per_shard == shard
        low, high = int(contexts[here][0]), int(contexts[here][-1]) + 1
        found[here] = store.tokens(low, high)[contexts[here] - low]
    return found[place[:, None], inside]


def _documents(store: ActivationStore, rows: Ints) -> Ints:
    """Return the document of each row, -1 between documents."""
    found = np.empty(len(rows), np.int64)
    shards, inside = np.divmod(rows, store.shard_rows)
    for shard in np.unique(shards).tolist():
        here = shards == shard
        found[here] = store.row_documents(shard)[0][inside[here]]
    return found
