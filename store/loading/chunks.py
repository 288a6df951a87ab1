"""The rows that a rule selects, read chunk by chunk and put at the places that the order gives."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from sae_harvest.common.finite import require_finite
from sae_harvest.store.reader import ActivationStore, Scratch
from sae_harvest.store.rules import RowRule

READS = 4  # concurrent reads


@dataclass(frozen=True, slots=True, eq=False)
class RowBuffer:
    """Memory for selected rows, and one spare row that takes the unwanted ones."""

    rows: npt.NDArray[np.int64]
    """Row numbers, int64 [capacity + 1]."""
    x: tuple[npt.NDArray[Any], ...]
    """For each site [capacity + 1, width], in the dtype that the store reads as."""


def selected_at(
    store: ActivationStore, sites: Sequence[str], rule: RowRule, shard: int
) -> npt.NDArray[np.bool_]:
    """Return the mask of rows that the rule selects at all sites, bool [rows of the shard]."""
    return np.logical_and.reduce([store.selected_in_shard(site, rule, shard) for site in sites])


class SelectedRows:
    """Rows of one or several sites that a rule selects at all of the sites.

    Chunks are those of the first site. One bit per row stays in memory.
    """

    def __init__(self, store: ActivationStore, sites: tuple[str, ...], rule: RowRule) -> None:
        self._store, self._sites = store, sites
        self._chunk_rows = store.chunk_rows(sites[0])

        def select(shard: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.uint8]]:
            selected = selected_at(store, sites, rule, shard)
            edges = np.arange(0, len(selected), self._chunk_rows)
            return np.add.reduceat(selected, edges, dtype=np.int64), np.packbits(selected)

        with ThreadPoolExecutor(READS) as pool:
            found = list(pool.map(select, range(store.n_shards)))
        self.counts = np.concatenate([counts for counts, _ in found])  # [chunks]
        self._bits = [bits for _, bits in found]

    def buffer(self, capacity: int) -> RowBuffer:
        """Allocate memory for `capacity` rows."""
        return RowBuffer(
            np.empty(capacity + 1, np.int64),
            tuple(
                np.empty((capacity + 1, self._store.width(site)), self._store.dtype)
                for site in self._sites
            ),
        )

    def read(
        self, chunk: int, places: npt.NDArray[np.int64], into: RowBuffer, scratch: Scratch
    ) -> None:
        """Read a chunk and put its selected rows at `places`.

        Args:
            chunk: number of the chunk.
            places: int64 [selected rows of the chunk]; rows at the last place of the buffer are
                dropped.

        Raises:
            DamagedError: the chunk is missing or damaged, or a wanted row is not finite.
        """
        spare = len(into.rows) - 1
        if not (places != spare).any():
            return
        start = chunk * self._chunk_rows
        shard = start // self._store.shard_rows
        first, last = self._store.shard_span(shard)
        inside = slice(start - first, min(start + self._chunk_rows, last) - first)
        keep = np.flatnonzero(np.unpackbits(self._bits[shard], count=inside.stop)[inside.start :])
        targets = np.full(inside.stop - inside.start, spare)
        targets[keep] = places
        into.rows[targets] = np.arange(start, start + len(targets))
        for site, out in zip(self._sites, into.x, strict=True):
            x = self._store.read(site, start, start + len(targets), scratch)
            require_finite(x, self._store.place, site, start, targets != spare)
            out[targets] = x
