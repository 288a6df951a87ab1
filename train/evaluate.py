"""How well a dictionary reconstructs rows it was not trained on: one streaming pass, float64.

    fvu = sum_rows |x - x_hat|^2 / sum_rows |x - mean|^2

0 for perfect reconstruction, 1 for predicting the mean of the rows evaluated. Of a transcoder, x
is the target site's row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from store.reader import ActivationStore
from store.rules import OUTLIER_MEDIANS, RowRule
from store.stats import Moments
from train.sharded import Dictionary

ENCODED_ROWS = 512  # at a time: nearly all latents may be active on a row that is an outlier


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

    def __init__(self, sae: Dictionary) -> None:
        self._fvu = Fvu(sae.config.width_out)
        self._active = 0
        self._fired = torch.zeros(sae.config.n_latents, dtype=torch.bool)

    def update(
        self,
        wanted: npt.NDArray[Any],
        got: npt.NDArray[Any],
        indices: torch.Tensor,
        values: torch.Tensor,
    ) -> None:
        self._fvu.update(wanted, got)
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


class _Report:
    """The two groups of one dictionary."""

    def __init__(self, sae: Dictionary) -> None:
        self._sae = sae
        self._ordinary, self._every = _Group(sae), _Group(sae)

    def update(self, x: torch.Tensor, wanted: torch.Tensor, ordinary: torch.Tensor) -> None:
        """Rows [rows, d_in], what they should give [rows, d_out], and which are no outliers."""
        indices, values = self._sae.encode(x)
        got = self._sae.decode(indices, values, x).cpu()  # [rows, d_out]
        indices, values = indices.cpu(), values.cpu()
        self._every.update(wanted.numpy(), got.numpy(), indices, values)
        self._ordinary.update(
            wanted[ordinary].numpy(), got[ordinary].numpy(), indices[ordinary], values[ordinary]
        )

    def report(self) -> dict[str, Any]:
        return {
            "without_outliers": self._ordinary.report(),
            "with_outliers": self._every.report(),
            "sae_digest": self._sae.digest,
        }


def evaluate(
    sae: Dictionary,
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
    return evaluate_all([sae], store, rule, max_rows, progress)[0]


def evaluate_all(
    saes: Sequence[Dictionary],
    store: ActivationStore,
    rule: RowRule,
    max_rows: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[dict[str, Any]]:
    """`evaluate` of several dictionaries of the same sites, in one pass over the rows."""
    config = saes[0].config
    site = store.site(config.site)
    target = None if config.target_site is None else store.site(config.target_site)
    medians = rule.max_norm_medians or OUTLIER_MEDIANS
    every = rule.model_copy(update={"split": "heldout", "max_norm_medians": None})
    ordinary = every.model_copy(update={"max_norm_medians": medians})
    reports = [_Report(sae) for sae in saes]
    heldout = np.flatnonzero(store.selected(site, every))[:max_rows]  # [rows]
    is_ordinary = store.selected(site, ordinary)[heldout]  # [rows]
    step = store.chunk_rows(site)
    edges = np.searchsorted(heldout, np.arange(0, store.n_rows + step, step))
    for chunk, (first, last) in enumerate(pairwise(edges)):
        if first == last:
            continue
        start = chunk * step
        stop, here = min(start + step, store.n_rows), heldout[first:last] - start
        x = torch.from_numpy(store.read(site, start, stop)[here]).float()  # [rows here, d_in]
        wanted = x
        if target is not None:
            wanted = torch.from_numpy(store.read(target, start, stop)[here]).float()
        ordinary_here = torch.from_numpy(is_ordinary[first:last])  # [rows here]
        pieces = (tensor.split(ENCODED_ROWS) for tensor in (x, wanted, ordinary_here))
        for piece in zip(*pieces, strict=True):
            for report in reports:
                report.update(*piece)
        progress(int(last), len(heldout))
    shared = {
        "outlier_rule": f"norm above {medians:g} medians of its shard",
        "heldout_fraction": rule.heldout_fraction,
        "site": site,
        "store_digest": store.digest,
    }
    return [{**report.report(), **shared} for report in reports]
