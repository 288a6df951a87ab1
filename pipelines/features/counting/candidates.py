"""Candidate rows on which a latent does not fire, for the contrast with its firings.

    inactive        any row, drawn uniformly
    hard, token     a row with one of the tokens that the latent fires on most
    hard, neighbour a row on which one of the latents nearest to it fires

There are more candidates than needed: those with a firing in their window are dropped later.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from sae_harvest.pipelines.features.counting import kernels
from sae_harvest.pipelines.features.tables.rows import Rows

ROWS_PER_TOKEN = 8
SPARE = 4  # candidates per row needed


class TokenRows:
    """A few rows of every token, drawn uniformly.

    `rows` is int64 [tokens, ROWS_PER_TOKEN], -1 where there are fewer.
    """

    def __init__(self, rows: Rows, seed: int, chunk: int = 1 << 20) -> None:
        n_tokens = 1 + max(
            (int(rows.token[low : low + chunk].max()) for low in range(0, len(rows.token), chunk)),
            default=0,
        )
        self.rows = np.full((n_tokens, ROWS_PER_TOKEN), -1, np.int64)
        priority = np.zeros((n_tokens, ROWS_PER_TOKEN), np.uint64)
        for low in range(0, len(rows.token), chunk):
            here = np.arange(low, min(low + chunk, len(rows.token)))
            kernels.draw_by_token(rows.token[here], rows.read(here), low, seed, priority, self.rows)


def inactive(
    latents: npt.NDArray[np.int64], n_rows: int, n: int, seed: int
) -> npt.NDArray[np.int64]:
    """Draw rows for each latent, [latents, SPARE n]."""
    return kernels.draw_rows(latents, n_rows, SPARE * n, seed)


def by_token(tokens: npt.NDArray[np.int64], of: TokenRows) -> npt.NDArray[np.int64]:
    """Return rows with tokens of each latent [latents, any], -1: none; tokens take turns."""
    rows = np.where(tokens[:, :, None] >= 0, of.rows[tokens], -1)  # [latents, tokens, rows]
    return rows.transpose(0, 2, 1).reshape(len(tokens), -1)


def by_neighbour(
    others: npt.NDArray[np.int64], drawn: npt.NDArray[np.int64]
) -> npt.NDArray[np.int64]:
    """Return rows on which other latents fire; the others take turns.

    Args:
        others: the other latents for each latent [latents, any], -1: none.
        drawn: rows drawn from the firings of every latent [n_latents, any], -1: none.
    """
    rows = np.where(others[:, :, None] >= 0, drawn[others], -1)
    return rows.transpose(0, 2, 1).reshape(len(others), -1)
