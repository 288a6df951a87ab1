"""The rarity of an activation, from the statistics of its latent.

The density gives the share of rows on which the latent fires. Its quantiles give the share of
firings that are at least as strong; between quantiles the logarithm of that share is interpolated
linearly. Among many latents some are far from their usual values on every row by chance, so the
product is multiplied by the number of latents. About one row in 10 has a latent with an unusualness
of 1 or more, one row in 100 a latent with 2 or more.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np

from sae_harvest.common.errors import RunError
from sae_harvest.pipelines.viewer.tables import Tables

QUANTILES = (10, 25, 50, 75, 90, 99)
STATISTICS = (
    f"SELECT latent, density, n_fire, max, {', '.join(f'q{q}' for q in QUANTILES)} FROM latents "
    "WHERE latent IN (SELECT unnest(?::INTEGER[]))"
)


class Unusual:
    """Unusualness of activations of some latents.

    Args:
        latents: the latents whose statistics are read.
    """

    def __init__(self, tables: Tables, latents: list[int]) -> None:
        self._curves = {
            row["latent"]: _curve(tables.features, row) for row in tables.ask(STATISTICS, latents)
        }
        self._n_live = max(tables.n_live, 1)
        self._n_rows = max(tables.n_rows, 1)

    def __call__(self, latent: int, value: float) -> float:
        """Return the unusualness u: about one row in 10^u has an activation as rare as this.

        Below 0, every row has several.
        """
        density, strengths, shares = self._curves[latent]
        if not density:  # the latent fired on no row that was read
            return math.log10(self._n_rows / self._n_live)
        return -math.log10(density * self._n_live) - float(np.interp(value, strengths, shares))


def _curve(features: Path, row: dict[str, Any]) -> tuple[float, list[float], list[float]]:
    """Return density, rising activations, and log10 of the share of firings at least as strong."""
    if not row["n_fire"]:
        return 0.0, [], []
    strengths = [0.0, *(row[f"q{q}"] for q in QUANTILES), row["max"]]
    shares = [0.0, *(math.log10(1 - q / 100) for q in QUANTILES)]
    shares.append(min(-math.log10(row["n_fire"]), shares[-1]))
    if None in strengths or strengths != sorted(strengths) or not (row["density"] or 0) > 0:
        raise RunError(
            f"{features / 'latents'}.parquet is damaged (latent {row['latent']} has an impossible "
            "density or quantiles); build the tables again."
        )
    return row["density"], strengths, shares
