"""Statistics of firings, counted for one latent at a time, in the order of rows, so that they do
not depend on how latents are divided among workers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from sae_harvest.pipelines.features.building.config import FeatureConfig
from sae_harvest.pipelines.features.counting import kernels
from sae_harvest.pipelines.features.counting.token_counts import TokenCounts
from sae_harvest.pipelines.features.encoding.firings import Blocks, Firings
from sae_harvest.pipelines.features.tables.folder import DECILES
from sae_harvest.pipelines.features.tables.rows import Rows

LATENTS = 8192  # latents at a time; 4 kB of statistics each
PAIRS = 1 << 22  # most pairs (latent, token) in memory
POSITION_PARTS = 16
OTHER = 0x5DEECE66D  # so that deciles and `random` are drawn independently
TRIED_TOKENS = 3  # tokens whose other rows are candidates for hard negatives


class ShortLists:
    """The firings with the highest priority in each list: [lists, places], best first.

    `kept` [lists] counts the places in use.
    """

    def __init__(self, lists: int, places: int) -> None:
        self.kept = np.zeros(lists, np.int64)
        self.priority = np.zeros((lists, places))
        self.row = np.zeros((lists, places), np.int64)
        self.value = np.zeros((lists, places), np.float32)
        self.document = np.full((lists, places), -2, np.int64)

    @property
    def used(self) -> npt.NDArray[np.bool_]:
        """Mask of the places in use, bool [lists, places]."""
        return np.arange(self.row.shape[1]) < self.kept[:, None]

    def arrays(self) -> tuple[npt.NDArray[np.generic], ...]:
        """Return the arrays in the order of the kernels' arguments."""
        return self.kept, self.priority, self.row, self.value, self.document


@dataclass(eq=False)
class ChosenRows:
    """The firings from which examples are made, for the latents first to first + n - 1."""

    first: int
    """The first latent."""
    top: ShortLists
    """Highest activations, one per document; n lists."""
    random: ShortLists
    """Firings drawn from all firings; n lists."""
    deciles: ShortLists
    """Firings drawn from each tenth of a latent's activations; 10 n lists."""
    tokens: npt.NDArray[np.int64]
    """int64 [n, TRIED_TOKENS], the most frequent tokens; -1 where there are fewer."""


@dataclass(eq=False)
class Profile:
    """Statistics of the latents [first, first + n)."""

    first: int
    """The first latent."""
    n_fire: npt.NDArray[np.int64]
    """[n], rows on which each latent fires."""
    n_contexts: npt.NDArray[np.int64]
    """[n], contexts in which each latent fires."""
    power_sums: npt.NDArray[np.float64]
    """[n, 4], sums of a, a², a³ and a⁴ over firings."""
    largest: npt.NDArray[np.float32]
    """[n], highest activation."""
    histogram: npt.NDArray[np.int64]
    """[n, BINS], firings by bin of the activation."""
    positions: npt.NDArray[np.int64]
    """[n, POSITION_PARTS], firings by part of the context."""
    tokens: TokenCounts
    """Tokens of each latent by decreasing count, then token."""
    kept: ChosenRows
    """Firings from which examples are made."""


def latents_at_once(blocks: Blocks, n_tokens: int) -> int:
    """Return the number of latents whose statistics fit into memory, for any size of the store.

    A latent has a pair (latent, token) for each token on which it fires, at most all tokens.
    """
    tokens = min(n_tokens, blocks.n_pairs / max(blocks.n_latents, 1))
    return max(1, min(LATENTS, int(PAIRS / max(tokens, 1))))


def profile(
    blocks: Blocks, rows: Rows, context_length: int, config: FeatureConfig, first: int, last: int
) -> Profile:
    """Read the firings of the latents [first, last) twice: to count, then to draw by decile."""
    n, length = last - first, context_length
    kept = ChosenRows(
        first,
        ShortLists(n, config.n_top),
        ShortLists(n, config.n_random),
        ShortLists(n * DECILES, config.n_decile),
        np.full((n, TRIED_TOKENS), -1, np.int64),
    )
    found = Profile(
        first=first,
        n_fire=np.zeros(n, np.int64),
        n_contexts=np.zeros(n, np.int64),
        power_sums=np.zeros((n, 4)),
        largest=np.zeros(n, np.float32),
        histogram=np.zeros((n, kernels.BINS), np.int64),
        positions=np.zeros((n, min(POSITION_PARTS, length)), np.int64),
        tokens=TokenCounts.none(n),
        kept=kept,
    )
    counts = TokenCounts.none(n)
    for inside, firings in blocks.all(first, last):
        documents = rows.document[inside]
        kernels.add_moments(
            firings.starts,
            firings.row,
            firings.value,
            length,
            found.n_fire,
            found.n_contexts,
            found.power_sums,
            found.largest,
            found.histogram,
            found.positions,
        )
        kernels.keep_top(
            firings.starts,
            firings.row,
            firings.value,
            documents,
            firings.first_row,
            *kept.top.arrays(),
        )
        _draw(firings, documents, np.empty((n, 0)), config.seed, kept.random)
        counts = counts.plus(firings, rows.token[inside])
    found.tokens = counts.commonest_first()
    starts = found.tokens.starts
    for rank in range(TRIED_TOKENS):
        several = np.diff(starts) > rank
        kept.tokens[several, rank] = found.tokens.token[starts[:-1][several] + rank]
    if config.n_decile:
        edges = decile_edges(found.histogram)
        all_at_once = [(inside, firings)] if firings.first_row == 0 else None
        for inside, firings in all_at_once or blocks.all(first, last):
            documents = rows.document[inside]
            _draw(firings, documents, edges, config.seed ^ OTHER, kept.deciles)
    return found


def bin_edge(number: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    """Return the lower edge of a histogram bin."""
    return 2.0 ** (kernels.LOWEST_OCTAVE + number / kernels.BINS_PER_OCTAVE)


def decile_edges(histogram: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """Find the nine edges between tenths of each latent's firings [n, 9], at edges of bins.

    Each is the edge for which the number of firings below it is nearest; of equal ones, the lowest.
    """
    below = np.zeros((len(histogram), kernels.BINS + 1), np.int64)
    histogram.cumsum(axis=1, out=below[:, 1:])
    all_latents, edges = np.arange(len(histogram)), np.empty((len(histogram), DECILES - 1))
    for tenth in range(1, DECILES):
        wanted = tenth * below[:, -1] / DECILES
        high = (below < wanted[:, None]).sum(axis=1)
        fewer, more = below[all_latents, np.maximum(high - 1, 0)], below[all_latents, high]
        low = (below < fewer[:, None]).sum(axis=1)
        edges[:, tenth - 1] = bin_edge(np.where(wanted - fewer <= more - wanted, low, high))
    return edges


def _draw(
    firings: Firings,
    documents: npt.NDArray[np.int64],
    edges: npt.NDArray[np.float64],
    seed: int,
    lists: ShortLists,
) -> None:
    if lists.row.shape[1] == 0:
        return
    kernels.draw(
        firings.starts,
        firings.row,
        firings.value,
        documents,
        firings.first_row,
        firings.first_latent,
        edges,
        seed,
        *lists.arrays(),
    )
