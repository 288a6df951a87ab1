"""Reconstruction error on held-out rows: one streaming pass with sums in float64.

    fvu = sum_rows |x - x_hat|^2 / sum_rows |x - mean|^2

It is 0 for perfect reconstruction and 1 for predicting the mean of the evaluated rows. For a
transcoder, x is the row of the target site. docs/evaluation.md says which rows are evaluated.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from sae_harvest.common.finite import require_finite
from sae_harvest.store.loading.chunks import selected_at
from sae_harvest.store.reader import ActivationStore
from sae_harvest.store.rules import OUTLIER_MEDIANS, RowRule
from sae_harvest.store.statistics.stats import Moments
from sae_harvest.train.config import SAEConfig
from sae_harvest.train.sae.sharded_sae import Dictionary

# Each row belongs to one class: (whether it is an outlier, whether it is a BOS).
CLASSES = ((False, False), (False, True), (True, False), (True, True))
# reported group → whether a class of rows belongs to it
GROUPS: dict[str, Callable[[bool, bool], bool]] = {
    "without_outliers": lambda outlier, bos: not outlier,
    "with_outliers": lambda outlier, bos: True,
}
GROUPS_WITHOUT_BOS: dict[str, Callable[[bool, bool], bool]] = {
    "without_outliers_without_bos": lambda outlier, bos: not (outlier or bos),
    "with_outliers_without_bos": lambda outlier, bos: not bos,
}
ENCODED_ROWS = 512  # rows encoded at a time: nearly all latents may be active on an outlier row


class Fvu:
    """Fraction of variance unexplained over rows that are added in any number of pieces."""

    def __init__(self, width: int) -> None:
        self._moments = Moments.empty(width)
        self._error = 0.0

    @property
    def rows(self) -> int:
        return self._moments.rows

    def update(self, x: npt.NDArray[Any], x_hat: npt.NDArray[Any]) -> None:
        """Add rows and their reconstructions, both [rows, width]."""
        if len(x):
            self._moments = self._moments.merge(Moments.of(x))
            self._error += float(np.square(x.astype(np.float64) - x_hat).sum())

    def merge(self, other: Fvu) -> None:
        """Add the rows of another `Fvu`."""
        self._moments = self._moments.merge(other._moments)
        self._error += other._error

    @property
    def value(self) -> float | None:
        """The fraction; None if the variance is 0."""
        total = float(self._moments.m2.sum())
        return self._error / total if total > 0 else None


class _Figures:
    """Figures of some rows, which are added in any number of pieces."""

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

    def merge(self, other: _Figures) -> None:
        self._fvu.merge(other._fvu)
        self._active += other._active
        self._fired |= other._fired

    def report(self) -> dict[str, Any]:
        rows = self._fvu.rows
        return {
            "rows": rows,
            "fvu": self._fvu.value,
            "l0": self._active / rows if rows else None,
            "dead_share": float((~self._fired).double().mean()) if rows else None,
        }


class _Report:
    """The figures of one dictionary: each row is counted once, in its class."""

    def __init__(self, sae: Dictionary) -> None:
        self._sae = sae
        self._classes = [_Figures(sae) for _ in CLASSES]

    def update(self, x: torch.Tensor, wanted: torch.Tensor, classes: torch.Tensor) -> None:
        """Add rows [rows, d_in], with targets [rows, d_out] and classes int64 [rows]."""
        indices, values = self._sae.encode(x)
        got = self._sae.decode(indices, values, x).cpu()  # [rows, d_out]
        indices, values = indices.cpu(), values.cpu()
        for number in classes.unique().tolist():
            here = classes == number
            self._classes[number].update(
                wanted[here].numpy(), got[here].numpy(), indices[here], values[here]
            )

    def report(self, with_bos: bool) -> dict[str, Any]:
        """Return the figures by group; `with_bos` adds the groups without BOS rows."""
        found: dict[str, Any] = {}
        for name, has in (GROUPS | (GROUPS_WITHOUT_BOS if with_bos else {})).items():
            together = _Figures(self._sae)
            for properties, figures in zip(CLASSES, self._classes, strict=True):
                if has(*properties):
                    together.merge(figures)
            found[name] = together.report()
        return {**found, "sae_digest": self._sae.digest}


def evaluate(
    sae: Dictionary,
    store: ActivationStore,
    rule: RowRule,
    max_rows: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any]:
    """Evaluate the reconstruction of held-out rows, in the store's order (contexts are shuffled).

    Args:
        sae: the dictionary; its configuration names the site, and the target of a transcoder.
        store: the store to read.
        rule: the rule of training; its held-out documents are read, with any split.
        max_rows: rows to read at most, outliers included.
        progress: called with rows done and rows to do.

    Returns:
        "without_outliers" and "with_outliers", each with rows, fvu, l0 (active latents per row)
        and dead_share (latents that fired on none of these rows); None if there are no rows. If
        contexts begin with a BOS, also "without_outliers_without_bos" and
        "with_outliers_without_bos". Also the digests and settings that the figures depend on.

    Raises:
        DamagedError: a row is not finite, or an object of the store is damaged.
    """
    return evaluate_all([sae], store, rule, max_rows, progress)[0]


def evaluate_all(
    saes: Sequence[Dictionary],
    store: ActivationStore,
    rule: RowRule,
    max_rows: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[dict[str, Any]]:
    """Evaluate several dictionaries of the same sites in one pass; see `evaluate`."""
    config = saes[0].config
    rows, classes = heldout_rows(store, config, rule, max_rows)
    reports = [_Report(sae) for sae in saes]
    for here, x, wanted in batches(store, config, rows):
        for report in reports:
            report.update(x, wanted, classes[here])
        progress(here.stop, len(rows))
    has_bos = store.plan["bos"] == "context"
    shared = {
        "outlier_rule": f"norm above {medians_of(rule):g} medians of its shard",
        "heldout_fraction": rule.heldout_fraction,
        "split": rule.split,
        "site": config.site,
        "store_digest": store.digest,
    }
    return [{**report.report(has_bos), **shared} for report in reports]


def sites_of(store: ActivationStore, config: SAEConfig) -> list[str]:
    """Return the site of an SAE and the target of a transcoder, as the store names them.

    Raises:
        InputError: the store has no such site.
    """
    sites = [store.site(config.site)]
    return sites if config.target_site is None else [*sites, store.site(config.target_site)]


def medians_of(rule: RowRule) -> float:
    """Return the number of medians that the norm of an outlier row exceeds."""
    return rule.max_norm_medians or OUTLIER_MEDIANS


def heldout_rows(
    store: ActivationStore, config: SAEConfig, rule: RowRule, most: int
) -> tuple[npt.NDArray[np.int64], torch.Tensor]:
    """Return the first held-out rows of the store and the class of each.

    A row is an outlier if training leaves it out for its norm at any site of the SAE, or, if
    training left out no row, if its norm is above 5 medians.

    Args:
        config: configuration of the SAE: its site, and the target of a transcoder.
        rule: the rule of training; its held-out documents are read, with any split.
        most: largest number of rows.

    Returns:
        Row numbers in order, int64 [rows]; index of each row's class in CLASSES, int64 [rows].
    """
    sites = sites_of(store, config)
    heldout = rule.model_copy(update={"split": "heldout", "max_norm_medians": medians_of(rule)})
    every = heldout.model_copy(update={"max_norm_medians": None})
    has_bos = store.plan["bos"] == "context"
    rows, classes = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
    for shard in range(store.n_shards):
        if most == 0:
            break
        here = np.flatnonzero(selected_at(store, sites[:1], every, shard))[:most]
        is_outlier = ~selected_at(store, sites, heldout, shard)[here]
        is_bos = (here % store.context_length == 0) & has_bos
        rows.append(here + store.shard_span(shard)[0])
        classes.append(2 * is_outlier.astype(np.int64) + is_bos)
        most -= len(here)
    return np.concatenate(rows), torch.from_numpy(np.concatenate(classes))


def batches(
    store: ActivationStore, config: SAEConfig, rows: npt.NDArray[np.int64]
) -> Iterator[tuple[slice, torch.Tensor, torch.Tensor]]:
    """Yield rows and what the SAE should return for them, at most 512 at a time.

    Args:
        config: configuration of the SAE.
        rows: numbers of rows in order, int64 [rows].

    Yields:
        the slice of `rows`; the rows, float32 [batch, d_in]; the same rows, or those of a
        transcoder's target site, float32 [batch, d_out].

    Raises:
        DamagedError: a row is not finite, or an object of the store is damaged.
    """
    sites = sites_of(store, config)
    chunk_rows = store.chunk_rows(sites[0])
    chunks, firsts = np.unique(rows // chunk_rows, return_index=True)
    parts = pairwise([*firsts.tolist(), len(rows)])  # the rows of each chunk
    for chunk, (first, last) in zip(chunks.tolist(), parts, strict=True):
        start = chunk * chunk_rows
        found = [_read(store, site, start, start + chunk_rows, rows[first:last]) for site in sites]
        for begin in range(first, last, ENCODED_ROWS):
            here = slice(begin, min(begin + ENCODED_ROWS, last))
            inside = slice(here.start - first, here.stop - first)
            yield here, found[0][inside], found[-1][inside]


def _read(
    store: ActivationStore, site: str, start: int, stop: int, rows: npt.NDArray[np.int64]
) -> torch.Tensor:
    """Return rows that are in [start, stop), float32 [rows, d]."""
    x = store.read(site, start, min(stop, store.n_rows))
    is_read = np.zeros(len(x), np.bool_)
    is_read[rows - start] = True
    require_finite(x, store.place, site, start, is_read)
    return torch.from_numpy(x[rows - start]).float()


def remarks(evaluation: Mapping[str, Any]) -> list[str]:
    """Return sentences about problems that an evaluation shows; usually none."""
    figures = evaluation["without_outliers"]
    found = []
    if evaluation["with_outliers"]["rows"] == 0:
        found.append(
            "No row of the store was held out, so nothing says how well this dictionary "
            "reconstructs other text; train with a larger --heldout-fraction, or harvest more."
        )
    elif evaluation.get("split", "train") != "train":
        found.append(
            f"The dictionary was trained with --split {evaluation['split']}, on the same rows that "
            "were evaluated, so these figures say nothing about other text."
        )
    if figures["dead_share"] == 1:
        found.append(
            "No latent fired on any of the rows, so every reconstruction is the same; lower --lr "
            "or the penalty, or train on more tokens."
        )
    elif figures["fvu"] is not None and figures["fvu"] > 1:
        found.append(
            f"FVU is {figures['fvu']:.4g}, above 1: the mean of the rows would be a better "
            "reconstruction; lower --lr, or train on more tokens."
        )
    return found
