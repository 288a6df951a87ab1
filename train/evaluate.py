"""How well a dictionary reconstructs rows it was not trained on: one streaming pass, float64.

    fvu = sum_rows |x - x_hat|^2 / sum_rows |x - mean|^2

0 for perfect reconstruction, 1 for predicting the mean of the rows evaluated.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from store.reader import ActivationStore
from store.rules import OUTLIER_MEDIANS, RowRule
from store.stats import Moments
from train.sae import SAE


class Fvu:
    """Fraction of variance unexplained, of rows given in any number of pieces."""

    def __init__(self, width: int) -> None:
        self._moments = Moments.empty(width)
        self._error = 0.0

    @property
    def rows(self) -> int:
        return self._moments.rows

    def update(self, x: npt.NDArray[Any], x_hat: npt.NDArray[Any]) -> None:
        """Rows and their reconstructions, both [rows, width]."""
        if len(x):
            self._moments = self._moments.merge(Moments.of(x))
            self._error += float(np.square(x.astype(np.float64) - x_hat).sum())

    @property
    def value(self) -> float | None:
        """The fraction; None without variance, where it has no meaning."""
        total = float(self._moments.m2.sum())
        return self._error / total if total > 0 else None


class _Group:
    """What is reported of one choice of rows."""

    def __init__(self, sae: SAE) -> None:
        self._fvu = Fvu(sae.config.d_in)
        self._active = 0
        self._fired = torch.zeros(sae.config.n_latents, dtype=torch.bool)

    def update(
        self,
        x: npt.NDArray[Any],
        x_hat: npt.NDArray[Any],
        indices: torch.Tensor,
        values: torch.Tensor,
    ) -> None:
        self._fvu.update(x, x_hat)
        active = values > 0
        self._active += int(active.sum())
        self._fired[indices[active].long()] = True

    def report(self) -> dict[str, Any]:
        rows = self._fvu.rows
        return {
            "rows": rows,
            "fvu": self._fvu.value,
            "l0": self._active / rows if rows else None,
            "dead_share": float((~self._fired).double().mean()) if rows else None,
        }


def evaluate(
    sae: SAE,
    store: ActivationStore,
    rule: RowRule,
    max_rows: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any]:
    """Reconstruction of held-out rows, in the store's order, which is shuffled by context.

    Args:
        sae: the dictionary; its configuration names the site.
        store: where the rows are.
        rule: the rule of training; its held-out documents are read, whatever its split.
        max_rows: rows to read at most, outliers included.
        progress: called with rows done and rows to do.

    Returns:
        "without_outliers" and "with_outliers", each with rows, fvu, l0 (active latents per row)
        and dead_share (latents that fired in none of these rows), None where there are no rows;
        and what it was computed from.
    """
    site = store.site(sae.config.site)
    medians = rule.max_norm_medians or OUTLIER_MEDIANS
    every = rule.model_copy(update={"split": "heldout", "max_norm_medians": None})
    ordinary = every.model_copy(update={"max_norm_medians": medians})
    groups = {"without_outliers": _Group(sae), "with_outliers": _Group(sae)}
    heldout = np.flatnonzero(store.selected(site, every))[:max_rows]  # [rows]
    is_ordinary = store.selected(site, ordinary)[heldout]  # [rows]
    step = store.chunk_rows(site)
    edges = np.searchsorted(heldout, np.arange(0, store.n_rows + step, step))
    for chunk, (first, last) in enumerate(pairwise(edges)):
        if first == last:
            continue
        start = chunk * step
        rows = store.read(site, start, min(start + step, store.n_rows))
        x = rows[heldout[first:last] - start].astype(np.float32)  # [rows of this chunk, d_in]
        indices, values = (part.cpu() for part in sae.encode(torch.from_numpy(x)))
        decoded = sae.decode(indices.to(sae.device), values.to(sae.device)).cpu().numpy()
        groups["with_outliers"].update(x, decoded, indices, values)
        keep = is_ordinary[first:last]
        chosen = torch.from_numpy(keep)
        groups["without_outliers"].update(x[keep], decoded[keep], indices[chosen], values[chosen])
        progress(int(last), len(heldout))
    return {
        **{name: group.report() for name, group in groups.items()},
        "outlier_rule": f"norm above {medians:g} medians of its shard",
        "heldout_fraction": rule.heldout_fraction,
        "site": site,
        "store_digest": store.digest,
        "sae_digest": sae.digest,
    }
