"""The rarity of an activation: how often a row has it, by the latent's own statistics.

A latent fires on a share of rows (its density), and of its firings a known share is at least as
strong (its quantiles, between which the logarithm of that share is taken to be linear). On every
row some of the many latents are far out by chance, so this is multiplied by their number: an
unusualness of 1 is what about one row in ten has, 2 one in a hundred.
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
        latents: those that will be asked for.
    """

    def __init__(self, tables: Tables, latents: list[int]) -> None:
        self._curves = {
            row["latent"]: _curve(tables.features, row) for row in tables.ask(STATISTICS, latents)
        }
        self._n_live = max(tables.n_live, 1)
        self._n_rows = max(tables.n_rows, 1)

    def __call__(self, latent: int, value: float) -> float:
        """log10 of the number of rows of which one has an activation as rare as this.

        Below 0, every row has several.
        """
        density, strengths, shares = self._curves[latent]
        if not density:  # it fired on none of the rows read
            return math.log10(self._n_rows / self._n_live)
        return -math.log10(density * self._n_live) - float(np.interp(value, strengths, shares))


def _curve(features: Path, row: dict[str, Any]) -> tuple[float, list[float], list[float]]:
    """density; activations, rising; log10 of the share of firings at least as strong as each."""
    if not row["n_fire"]:
        return 0.0, [], []
    strengths = [0.0, *(row[f"q{q}"] for q in QUANTILES), row["max"]]
    shares = [0.0, *(math.log10(1 - q / 100) for q in QUANTILES)]
    shares.append(min(-math.log10(row["n_fire"]), shares[-1]))
    if None in strengths or strengths != sorted(strengths) or not (row["density"] or 0) > 0:
        raise RunError(
            f"{features / 'latents'}.parquet is damaged (latent {row['latent']}: its density or "
            "quantiles are not what they can be); build the tables again."
        )
    return row["density"], strengths, shares
