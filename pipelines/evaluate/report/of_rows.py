"""The parts of an evaluation that read rows and weights: reconstruction, weights."""

from __future__ import annotations

import numpy as np

from sae_harvest.pipelines.evaluate.figures import Figure
from sae_harvest.pipelines.evaluate.reconstruction import (
    PARTS,
    HeldoutRows,
    Reconstruction,
    reconstruction,
)
from sae_harvest.pipelines.evaluate.report.inputs import Inputs
from sae_harvest.pipelines.evaluate.report.parts import Curve, Part
from sae_harvest.pipelines.evaluate.weights import weight_figures
from sae_harvest.train.evaluate import medians_of

DENSITY_EDGES = np.arange(-6.0, 0.25, 0.25)  # log10 of the share of rows on which a latent fires


def weights_part(inputs: Inputs) -> Part:
    """Measure the weights of the SAE and its baselines."""
    figures = [
        figure for name, sae in inputs.dictionaries.items() for figure in weight_figures(sae, name)
    ]
    return Part(figures)


def reconstruction_part(inputs: Inputs) -> Part:
    """Reconstruct held-out rows by the SAE and its baselines."""
    config = inputs.sae.config
    held_out = HeldoutRows.of(inputs.store, config, config.rule, inputs.settings.rows)
    progress = inputs.progress("reconstruction")
    found = reconstruction(inputs.dictionaries, inputs.store, held_out, progress)
    figures: list[Figure] = []
    curves: list[Curve] = []
    for (name, part), sums in found.items():
        figures.extend(sums.figures(name, part))
        if part == PARTS[0]:
            curves.extend(_curves(name, sums))
    outliers = int(held_out.is_outlier.sum())
    clusters = len(np.unique(held_out.cluster))
    notes = [
        f"{len(held_out.rows):,} held-out rows; their documents are in {clusters} clusters, from "
        f"which intervals are drawn. {outliers:,} are outlier rows (norm above "
        f"{medians_of(config.rule):g} medians of their shard), which training leaves out."
    ]
    return Part(figures, curves, notes)


def _curves(name: str, sums: Reconstruction) -> list[Curve]:
    positions = np.arange(len(sums.per_position))
    shares = np.sort(sums.per_dimension)
    density = np.log10(np.maximum(sums.n_fire / max(1, sums.rows), 1e-12))
    counts, _ = np.histogram(density[sums.n_fire > 0], DENSITY_EDGES)
    middles = (DENSITY_EDGES[1:] + DENSITY_EDGES[:-1]) / 2
    return [
        Curve.of("fvu by position", name, positions, sums.per_position),
        Curve.of("fvu by dimension", name, np.linspace(0, 1, len(shares)), shares),
        Curve.of("density", name, middles, counts),
        Curve.of("l0", name, np.arange(len(sums.l0)), sums.l0 / max(1, sums.rows)),
    ]
