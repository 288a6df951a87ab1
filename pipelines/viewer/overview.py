"""Figures and plots of the start page."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from sae_harvest.pipelines.viewer.tables import SUMMARY, Tables, plain

BINS = 40
POINTS = 12_000  # largest number of points in the scatter plot; more are thinned out evenly
LOGARITHMIC = ("density", "max", "n_tokens")
PLOTTED = (
    "density",
    "max",
    "token_entropy_bits",
    "encoder_decoder_cosine",
    "kurtosis",
    "bimodality",
)


def overview(tables: Tables) -> dict[str, Any]:
    """Return the content of the start page, without the list."""
    columns = ", ".join(f"{name}::DOUBLE AS {name}" for name in SUMMARY)
    live = tables.ask(f"SELECT {columns} FROM summary WHERE NOT dead ORDER BY latent")
    values = {
        name: np.array([row[name] for row in live], dtype=np.float64)  # None is nan
        for name in SUMMARY
    }
    run = tables.run
    return {
        "name": tables.name,
        "run": {key: plain(value) for key, value in run.items()},
        "n_latents": tables.n_latents,
        "n_dead": tables.n_latents - len(live),
        "n_rows": run.get("n_rows"),
        "mean_firing": plain(float(np.nansum(values["density"]))),
        "columns": SUMMARY,
        "plots": {name: _histogram(values[name], name in LOGARITHMIC) for name in PLOTTED},
        "scatter": _scatter(values),
        "explanations": tables.has_explanations,
    }


def _histogram(values: npt.NDArray[np.float64], logarithmic: bool) -> dict[str, Any]:
    """Count values: counts [BINS], edges [BINS + 1]; the last bin includes its upper edge."""
    values = values[np.isfinite(values)]
    if logarithmic:
        values = values[values > 0]
    if not len(values):
        return {"edges": [], "counts": [], "log": logarithmic}
    # the outermost 0.1 % go to the first and last bin, so that one value does not squeeze the rest
    low, high = np.quantile(values, [0.001, 0.999])
    if low == high:
        low, high = low * 0.5, high * 1.5 + (high == 0)
    edges = np.geomspace(low, high, BINS + 1) if logarithmic else np.linspace(low, high, BINS + 1)
    counts, _ = np.histogram(np.clip(values, edges[0], edges[-1]), edges)
    edges[0], edges[-1] = min(edges[0], values.min()), max(edges[-1], values.max())
    return {"edges": plain(edges.tolist()), "counts": counts.tolist(), "log": logarithmic}


def _scatter(values: dict[str, npt.NDArray[np.float64]]) -> dict[str, Any]:
    """Return density and maximum of each latent, thinned out to `POINTS`."""
    step = max(1, -(-len(values["latent"]) // POINTS))
    return {
        "latent": values["latent"][::step].astype(int).tolist(),
        "density": plain(values["density"][::step].tolist()),
        "max": plain(values["max"][::step].tolist()),
        "step": step,
    }
