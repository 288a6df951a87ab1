"""Everything the feature pass counts, block by block, for all latents at once."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pipelines.features import kernels
from pipelines.features.config import FeatureConfig
from train.kernels.gradient_jit import pairs_by_latent

COMPACT_ROWS = 20_000_000  # (latent, token) counts kept before equal ones are added up
WINDOW_BEFORE = 0.7  # share of the window before the peak: a causal model has seen only that


class ShortList:
    """Per latent, the contexts with the highest priority, with activations around each peak.

    Arrays are [n_latents, places], windows [n_latents, places, window].
    """

    def __init__(self, n_latents: int, places: int, window: int) -> None:
        shape = (n_latents, places)
        self.kept = np.zeros(n_latents, np.int64)
        self.priority = np.zeros(shape)
        self.peak_row = np.zeros(shape, np.int64)
        self.peak_document = np.full(shape, -2, np.int64)
        self.window_start = np.zeros(shape, np.int64)
        self.slot = np.zeros(shape, np.int64)
        self.windows = np.zeros((*shape, window), np.float32)

    def arrays(self) -> tuple[npt.NDArray[Any], ...]:
        """In the order that `kernels.keep_best` takes them."""
        return (
            self.kept,
            self.priority,
            self.peak_row,
            self.peak_document,
            self.window_start,
            self.slot,
            self.windows,
        )


class Accumulator:
    """Running statistics of all latents; memory does not depend on the number of rows, apart
    from the counts per (latent, token).

    Args:
        neighbours: for each latent the others to count co-firing with [n_latents, n].
    """

    def __init__(
        self,
        n_latents: int,
        context_length: int,
        neighbours: npt.NDArray[np.int64],
        config: FeatureConfig,
    ) -> None:
        self._n_latents, self._context_length = n_latents, context_length
        self._config = config
        window = min(config.window_tokens, context_length)
        self._before = int(window * WINDOW_BEFORE)
        self.n_rows = 0
        self.n_fire = np.zeros(n_latents, np.int64)
        self.n_contexts = np.zeros(n_latents, np.int64)
        self.power_sums = np.zeros((n_latents, 4))
        self.largest = np.zeros(n_latents, np.float32)
        self.histogram = np.zeros((n_latents, kernels.BINS), np.int64)
        self.top = ShortList(n_latents, config.n_top, window)
        self.random = ShortList(n_latents, config.n_random, window)
        self.neighbours = neighbours
        self.together = np.zeros_like(neighbours)
        self._marks = np.full(n_latents, -1, np.int64)
        self._token_parts: list[pa.Table] = []

    def add(
        self,
        first_row: int,
        selected: npt.NDArray[np.int64],
        indices: npt.NDArray[Any],
        values: npt.NDArray[np.float32],
        tokens: npt.NDArray[np.int32],
        documents: npt.NDArray[np.int64],
    ) -> None:
        """Add a block of whole contexts, in ascending order of rows.

        Args:
            first_row: row number of the block's first row.
            selected: which rows of the block were encoded, ascending [rows].
            indices, values: their latents and activations [rows, k].
            tokens, documents: of every row of the block [block rows].
        """
        self.n_rows += len(selected)
        live = np.where(values != 0, indices, -1)
        starts, places = pairs_by_latent(live, self._n_latents)
        row = selected.astype(np.int32)[places // indices.shape[1]]
        value = values.reshape(-1)[places]
        kernels.add_moments(
            starts,
            row,
            value,
            self._context_length,
            self.n_fire,
            self.n_contexts,
            self.power_sums,
            self.largest,
            self.histogram,
        )
        for short_list, by_document in ((self.top, True), (self.random, False)):
            if short_list.windows.shape[1] == 0:
                continue
            kernels.keep_best(
                starts,
                row,
                value,
                documents,
                first_row,
                self._context_length,
                self._before,
                by_document,
                self._config.seed,
                *short_list.arrays(),
            )
        kernels.count_together(
            indices, values, self.neighbours, self.together, self._marks, first_row
        )
        self._add_tokens(starts, row, value, tokens)

    def token_counts(self) -> pa.Table:
        """latent, token, count, total (sum of activations); each pair once.

        Sorted by latent, then most frequent first, then by token.
        """
        self._compact()
        order = [("latent", "ascending"), ("count", "descending"), ("token", "ascending")]
        self._token_parts = [self._token_parts[0].sort_by(order)]
        return self._token_parts[0]

    def _add_tokens(
        self,
        starts: npt.NDArray[np.int64],
        row: npt.NDArray[np.int32],
        value: npt.NDArray[np.float32],
        tokens: npt.NDArray[np.int32],
    ) -> None:
        token = np.empty(len(row), np.int32)
        count = np.empty(len(row), np.int64)
        total = np.empty(len(row), np.float64)
        distinct = kernels.count_tokens(starts, row, value, tokens, token, count, total)
        ends = np.cumsum(distinct)
        inside = np.arange(ends[-1]) - np.repeat(ends - distinct, distinct)
        at = np.repeat(starts[:-1], distinct) + inside
        self._token_parts.append(
            pa.table(
                {
                    "latent": np.repeat(np.arange(self._n_latents, dtype=np.int32), distinct),
                    "token": token[at],
                    "count": count[at],
                    "total": total[at],
                }
            )
        )
        if sum(len(part) for part in self._token_parts) > COMPACT_ROWS:
            self._compact()

    def _compact(self) -> None:
        joined = pa.concat_tables(self._token_parts).combine_chunks()
        grouped = joined.group_by(["latent", "token"], use_threads=False).aggregate(
            [("count", "sum"), ("total", "sum")]
        )
        self._token_parts = [grouped.rename_columns({"count_sum": "count", "total_sum": "total"})]
