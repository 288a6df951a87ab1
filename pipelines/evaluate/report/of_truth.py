"""The part of an evaluation on a synthetic store: what an SAE has found of the known features."""

from __future__ import annotations

from pathlib import Path

from sae_harvest.pipelines.evaluate.baselines import MEAN
from sae_harvest.pipelines.evaluate.reconstruction import HeldoutRows
from sae_harvest.pipelines.evaluate.report.inputs import Inputs
from sae_harvest.pipelines.evaluate.report.parts import Part
from sae_harvest.pipelines.evaluate.synthetic.ideal import ideal_sae
from sae_harvest.pipelines.evaluate.synthetic.recovery import IDEAL, PART, recoveries
from sae_harvest.train.synthetic.store import SITE, Synthetic


def is_synthetic(inputs: Inputs) -> bool:
    """Return whether the features of the evaluated store are known; it then has no model."""
    return bool(inputs.store.plan["corpus"]["name"] == SITE)


def recovery_part(inputs: Inputs) -> Part:
    """Compare the SAE, its baselines and the ideal SAE with the known features."""
    synthetic = Synthetic.open(Path(inputs.store.place).parent)
    config = inputs.sae.config
    saes = {name: one for name, one in inputs.dictionaries.items() if name != MEAN}
    saes[IDEAL] = ideal_sae(synthetic, config.rule).to(inputs.sae.device)
    held_out = HeldoutRows.of(inputs.store, config, config.rule, inputs.settings.rows)
    found = recoveries(saes, synthetic, held_out, inputs.progress("recovery of known features"))
    figures = [
        figure
        for name, recovery in found.items()
        for figure in recovery.figures(name)
        if figure.metric != "dead_share"  # a figure of the reconstruction as well
    ]
    notes = [
        f"{len(synthetic.features):,} known features, each matched to one latent; firings are "
        f"compared on {int(held_out.part(PART).sum()):,} held-out rows. The ideal SAE has the true "
        "directions, and one linear encoder with thresholds, fitted to the true magnitudes."
    ]
    return Part(figures, notes=notes)
