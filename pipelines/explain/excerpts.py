"""The texts that explanations are written from, chosen by and scored on: three sets of documents.

An excerpt is a window of a context in the tables, cut so that all of its tokens belong to the
document of its row. The hash of the document's text decides the set. Tables divide documents into
`explain` and `score`; the first half is divided again:

    train        2/3 of `explain`: shown to the explainer
    validation   1/3 of `explain`: chooses among candidates
    test         `score`: gives the scores; neither explainer nor choice have seen it
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import chain, islice, zip_longest
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq

from sae_harvest.common.errors import InputError, RunError
from sae_harvest.pipelines.features.tables.checks import require_tables
from sae_harvest.pipelines.features.tables.folder import DELPHI
from sae_harvest.pipelines.features.tables.rows import for_scores
from sae_harvest.pipelines.features.tables.texts import pieces
from sae_harvest.pipelines.source import NOTHING_MOVED, Locations, store_of
from sae_harvest.store.reader import ActivationStore

Part = Literal["train", "validation", "test"]
PARTS: tuple[Part, ...] = ("train", "validation", "test")
VALIDATION_SHARE = 3  # one in so many documents of `explain`
BEFORE = 0.7  # share of the tokens of an excerpt before its row, as in the tables
_MIX, _SHIFT = np.uint64(0xD6E8FEB86659FD93), np.uint64(33)
COLUMNS = (
    "latent", "stratum", "rank", "reason", "row", "position", "window_start", "token_ids",
    "token_ends", "activations", "text",
)  # fmt: skip


@dataclass(frozen=True, eq=False)
class Excerpt:
    """Tokens of one document around a row of the store, with a latent's activations."""

    latent: int
    """The latent."""

    stratum: str
    """The stratum of the table: top, decile_1 …, random, inactive, hard_negative."""

    reason: str | None
    """Kind of a hard negative: token, neighbour."""

    row: int
    """The row that it was chosen for."""

    first_row: int
    """Row of its first token; the others follow."""

    document: int
    """Document of all of its tokens; -1 for a BOS alone."""

    ids: tuple[int, ...]
    """Token ids."""

    texts: tuple[str, ...]
    """Text of each token; joined, they are its text."""

    activations: npt.NDArray[np.float32]
    """Activation of the latent on each token."""

    starts_context: bool
    """True if its first token is the first of a context, apart from a BOS."""

    @property
    def text(self) -> str:
        """The text."""
        return "".join(self.texts)

    @property
    def focus(self) -> int:
        """Place of the row that it was chosen for."""
        return self.row - self.first_row


@dataclass(frozen=True, eq=False)
class Evidence:
    """The excerpts of one latent."""

    latent: int
    """The latent."""

    largest: float
    """Its largest activation in the store."""

    facts: Mapping[str, Any]
    """Its row in the table of latents."""

    excerpts: Mapping[Part, Sequence[Excerpt]]
    """Excerpts of each set, by stratum and rank; no two of a set overlap."""

    def of(self, part: Part, strata: Iterable[str], most: int | None = None) -> list[Excerpt]:
        """Return excerpts of some strata: one of each stratum in turn, at most so many."""
        wanted = list(strata)
        lists: dict[str, list[Excerpt]] = {name: [] for name in wanted}
        for excerpt in self.excerpts[part]:
            if excerpt.stratum in lists:
                lists[excerpt.stratum].append(excerpt)
        turns = chain.from_iterable(zip_longest(*lists.values()))
        return list(islice((excerpt for excerpt in turns if excerpt is not None), most))


class EvidenceSource:
    """Tables and their store, from which the evidence of latents is read."""

    def __init__(self, features: Path, tokens: int, moved: Locations = NOTHING_MOVED) -> None:
        """Open the tables in a folder.

        Args:
            features: folder of the tables.
            tokens: tokens of an excerpt, at most.
            moved: new place of the store, if it has moved.

        Raises:
            RunError: there are no tables, or their store is missing.
            InputError: they were made from a cache of delphi, which has no documents.
        """
        self.features, self._tokens = features, tokens
        self.run = require_tables(features)
        if self.run["sae"] == DELPHI:
            raise InputError(
                f"{features} holds tables of a cache of delphi, which does not say where documents "
                "begin; explanations need tables of a store."
            )
        self.store: ActivationStore = store_of(features, self.run, moved.stores)
        self.n_latents: int = self.run["n_latents"]
        self._begins = int(self.store.plan["bos"] == "context")

    def alive(self) -> npt.NDArray[np.int64]:
        """Return the latents that fire, int64 [alive]."""
        return np.flatnonzero(self._n_fire > 0)

    def of(self, latents: Sequence[int]) -> Iterator[Evidence]:
        """Yield the evidence of latents, in the order of their numbers.

        Raises:
            RunError: a table is damaged.
        """
        wanted = sorted(set(latents))
        facts = {row["latent"]: row for row in self._read("latents", wanted, None)}
        rows: dict[int, list[dict[str, Any]]] = {latent: [] for latent in wanted}
        for row in self._read("contexts", wanted, list(COLUMNS)):
            rows[row["latent"]].append(row)
        for latent in wanted:
            excerpts: dict[Part, list[Excerpt]] = {part: [] for part in PARTS}
            for row in rows[latent]:
                part, excerpt = self._excerpt(row)
                if not any(_overlap(excerpt, other) for other in excerpts[part]):
                    excerpts[part].append(excerpt)
            largest = float(facts[latent]["max"] or 0.0)
            yield Evidence(latent, largest, facts[latent], excerpts)

    def documents(self, first: int, last: int) -> npt.NDArray[np.int64]:
        """Return the documents of rows of one context, int64 [rows]; -1 between documents."""
        return self._documents(first, last)[0]

    @cached_property
    def _n_fire(self) -> npt.NDArray[np.int64]:
        table = pq.read_table(self.features / "latents.parquet", columns=["n_fire"])
        found: npt.NDArray[np.int64] = table["n_fire"].to_numpy()
        return found

    def _read(
        self, name: str, latents: Sequence[int], columns: list[str] | None
    ) -> list[dict[str, Any]]:
        path = self.features / f"{name}.parquet"
        try:
            table = pq.read_table(path, columns=columns, filters=[("latent", "in", latents)])
        except (OSError, ValueError) as error:
            raise RunError(
                f"{path} cannot be read ({error}); build the tables again into another folder."
            ) from error
        return table.to_pylist()

    def _excerpt(self, row: dict[str, Any]) -> tuple[Part, Excerpt]:
        """Cut a window of the table to its document and its length; return its set as well."""
        length = self.store.context_length
        first = row["row"] - row["position"] + row["window_start"]
        focus = row["row"] - first
        n = len(row["token_ids"])
        documents, hashes = self._documents(first, first + n)
        start, stop = _same(documents, focus)
        start, stop = _around(focus, start, stop, self._tokens)
        here = slice(start, stop)
        text_hash = hashes[focus : focus + 1]
        return part_of(text_hash)[0], Excerpt(
            row["latent"],
            row["stratum"],
            row["reason"],
            row["row"],
            first + start,
            int(documents[focus]),
            tuple(row["token_ids"][here]),
            tuple(pieces(row["text"], row["token_ends"])[here]),
            np.array(row["activations"][here], np.float32),
            (first + start) % length == self._begins,
        )

    def _documents(
        self, first: int, last: int
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.uint64]]:
        """Return documents and hashes of rows of one context."""
        shard = first // self.store.shard_rows
        begin = shard * self.store.shard_rows
        documents, hashes = self._of_shard(shard)
        return documents[first - begin : last - begin], hashes[first - begin : last - begin]

    @cached_property
    def _of_shard(self) -> Any:
        return lru_cache(maxsize=64)(self.store.row_documents)


def part_of(text_hash: npt.NDArray[np.uint64]) -> list[Part]:
    """Return the set of each document, from the xxh3-64 of its text [documents]."""
    mixed = (text_hash ^ (text_hash >> _SHIFT)) * _MIX
    chosen = (mixed >> _SHIFT) % np.uint64(VALIDATION_SHARE) == 0
    scored = for_scores(text_hash)
    return [
        "test" if score else "validation" if validate else "train"
        for score, validate in zip(scored.tolist(), chosen.tolist(), strict=True)
    ]


def _same(documents: npt.NDArray[np.int64], focus: int) -> tuple[int, int]:
    """Return the limits of the run of equal numbers around a place."""
    other = documents != documents[focus]
    before, after = np.flatnonzero(other[:focus]), np.flatnonzero(other[focus:])
    return (
        int(before[-1]) + 1 if len(before) else 0,
        focus + int(after[0]) if len(after) else len(documents),
    )


def _around(focus: int, start: int, stop: int, most: int) -> tuple[int, int]:
    """Cut a range to at most so many places around one, most of them before it."""
    if stop - start <= most:
        return start, stop
    first = min(max(start, focus - int(BEFORE * most)), stop - most)
    return first, first + most


def _overlap(a: Excerpt, b: Excerpt) -> bool:
    return a.first_row < b.first_row + len(b.ids) and b.first_row < a.first_row + len(a.ids)
