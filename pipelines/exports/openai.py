"""Latents for OpenAI's sae-viewer, and neuron records for its automated-interpretability.

OUT/NAME/atoms/123.json            a latent, for sae-viewer
OUT/NAME/neurons/12/123.json       a NeuronRecord, for `load_neuron(12, 123, "file://…/neurons")`
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from sae_harvest.common.errors import InputError
from sae_harvest.pipelines.exports.files import json_bytes
from sae_harvest.pipelines.exports.tables import Context, Latent, Tables
from sae_harvest.pipelines.features.tables.folder import DECILES

BAR_WIDTH = 0.2  # fixed in the viewer


def widths(largest: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Return the width of the histogram's bars, the same for all latents."""
    return np.full(len(largest), BAR_WIDTH)


def write(
    all_tables: Sequence[Tables],
    latents: Sequence[Sequence[range]],
    out: Path,
    name: str | None,
    on_latent: Callable[[], None],
) -> None:
    """Write two files for each latent; each of the tables gets its own folder."""
    for tables, some in zip(all_tables, latents, strict=True):
        folder = out / (name or str(tables.site))
        if folder.exists():
            raise InputError(
                f"Two of the tables would have the name {folder.name}; export one of them."
            )
        layer = tables.site.layer
        atoms, neurons = folder / "atoms", folder / "neurons" / str(layer)
        atoms.mkdir(parents=True)
        neurons.mkdir(parents=True)
        for latent in tables.described(some, widths):
            (atoms / f"{latent.number}.json").write_bytes(json_bytes(atom(latent)))
            (neurons / f"{latent.number}.json").write_bytes(json_bytes(record(latent, layer)))
            on_latent()


def atom(latent: Latent) -> dict[str, Any]:
    """Make sae-viewer's `FeatureInfo` of a latent; moments are over all rows, about 0."""
    facts, (first, second, third, fourth) = latent.facts, moments(latent.facts)
    return {
        "density": facts["density"],
        "mean_act": first,
        "mean_act_squared": second,
        "skew": third / second**1.5 if second**2 else 0.0,
        "kurtosis": fourth / second**2 if second**2 else 0.0,
        "hist": {str(bar): n for bar, n in latent.bars.items()},
        "random": [_sequence(c) for c in latent.contexts.get("random", [])],
        "top": [_sequence(c) for c in latent.contexts.get("top", [])],
    }


def record(latent: Latent, layer: int) -> dict[str, Any]:
    """Make a `NeuronRecord`; moments are over all rows, about the mean."""
    first, second, third, fourth = moments(latent.facts)
    variance = max(second - first**2, 0.0)
    skewness = kurtosis = math.nan
    if variance**2:
        skewness = (third - 3 * first * second + 2 * first**3) / variance**1.5
        kurtosis = fourth - 4 * first * third + 6 * first**2 * second - 3 * first**4
        kurtosis /= variance**2
    deciles = [latent.contexts.get(f"decile_{tenth}", []) for tenth in range(1, DECILES + 1)]
    return {
        "dataclass_name": "NeuronRecord",
        "neuron_id": {
            "dataclass_name": "NeuronId",
            "layer_index": layer,
            "neuron_index": latent.number,
        },
        "random_sample": [_record(c) for c in latent.contexts.get("inactive", [])],
        "random_sample_by_quantile": [[_record(c) for c in part] for part in deciles],
        "quantile_boundaries": [tenth / DECILES for tenth in range(1, DECILES)],
        "mean": first,
        "variance": variance,
        "skewness": None if math.isnan(skewness) else skewness,
        "kurtosis": None if math.isnan(kurtosis) else kurtosis,
        "most_positive_activation_records": [_record(c) for c in latent.contexts.get("top", [])],
    }


def moments(facts: dict[str, Any]) -> tuple[float, float, float, float]:
    """Compute E[a], E[a²], E[a³], E[a⁴] over all rows from central moments over firings."""
    if facts["dead"]:
        return 0.0, 0.0, 0.0, 0.0
    mean, spread, density = facts["mean"], facts["std"], facts["density"]
    # They are null if all firings are about equal: then they hardly matter.
    skew, kurtosis = facts["skew"] or 0.0, facts["kurtosis"] or 0.0
    third = skew * spread**3 + 3 * mean * spread**2 + mean**3
    fourth = kurtosis * spread**4 + 4 * mean * skew * spread**3
    fourth += 6 * mean**2 * spread**2 + mean**4
    return density * mean, facts["mean_square"], density * third, density * fourth


def _sequence(context: Context) -> dict[str, Any]:
    """Make a `SequenceInfo` without its optional fields about ablations."""
    fires = sum(a > 0 for a in context.activations)
    return {
        "density": fires / len(context.activations),
        "doc_id": context.document,
        "idx": context.place,
        "act": context.activation,
        "acts": context.activations,
        "tokens": context.tokens,
        "token_ints": context.token_ids,
    }


def _record(context: Context) -> dict[str, Any]:
    return {
        "dataclass_name": "ActivationRecord",
        "tokens": context.tokens,
        "activations": context.activations,
    }
