"""Scores of programs with intervals, and their means over latents."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from sae_harvest.pipelines.evaluate.intervals import Floats, percentiles, resampled
from sae_harvest.pipelines.evaluate.programs.counting import METRICS, POSITIVE, N, figures_of_sums

RESAMPLES = 400  # for intervals of each latent, and of means over latents
FEW = 200  # for means of baselines
MIN_POSITIVES = 10  # fewest held-out firings of a latent that counts in a mean over latents

Values = tuple[Floats, Floats | None]  # metrics [latents, 6]; in resamples [resamples, latents, 6]


@dataclass(frozen=True, eq=False)
class Scores:
    """Scores of the programs of some latents."""

    values: Floats
    """The metrics of `METRICS` [latents, 6]; NaN without a held-out firing."""
    low: Floats
    """Lower limits of their intervals [latents, 6]."""
    high: Floats
    """Upper limits [latents, 6]."""
    other: Floats
    """The same metrics of another latent's program [latents, 6]; NaN if there is none."""
    recall: npt.NDArray[np.float32]
    """Recall in each tenth of the held-out firings, weakest first [latents, 10]."""
    positives: npt.NDArray[np.int64]
    """Held-out firings [latents]."""
    rows: int
    """Held-out rows."""


@dataclass(frozen=True, eq=False)
class Added:
    """Metrics of the latents with at least ten held-out firings."""

    program: Values
    """Values of their programs."""
    other: Values
    """Values of the programs of other latents, where there are others."""
    constant: Values
    """Values of a program that predicts the same, and a firing, on every row."""


class Mean:
    """A mean over latents of the metrics of `METRICS`, and its interval."""

    def __init__(self) -> None:
        self.latents = 0
        self._sum = np.zeros(len(METRICS))
        self._drawn: tuple[Floats, Floats] | None = None  # sums and numbers [resamples, 6]

    def add(self, values: Floats, drawn: Floats | None) -> None:
        """Add latents: values [latents, 6], and in resamples [resamples, latents, 6]."""
        self.latents += len(values)
        self._sum += values.sum(0)
        if drawn is not None:
            more = np.nansum(drawn, axis=1), np.isfinite(drawn).sum(axis=1).astype(np.float64)
            before = self._drawn or (np.zeros_like(more[0]), np.zeros_like(more[1]))
            self._drawn = before[0] + more[0], before[1] + more[1]

    def figures(self) -> Iterator[tuple[str, float, float | None, float | None]]:
        """Yield name, value and limits of each metric; nothing without latents."""
        if not self.latents:
            return
        low: list[float] | list[None] = [None] * len(METRICS)
        high = low
        if self._drawn is not None:
            total, n = self._drawn
            means = np.divide(total, n, out=np.full_like(total, np.nan), where=n > 0)
            low, high = (limits.tolist() for limits in percentiles(means))
        yield from zip(METRICS, (self._sum / self.latents).tolist(), low, high, strict=True)


@dataclass(frozen=True, eq=False)
class Means:
    """Means over the latents with at least ten held-out firings; see `Added`."""

    program: Mean = field(default_factory=Mean)
    other: Mean = field(default_factory=Mean)
    constant: Mean = field(default_factory=Mean)

    def add(self, added: Added) -> None:
        """Add latents."""
        for name in ("program", "other", "constant"):
            values, drawn = getattr(added, name)
            if len(values):
                getattr(self, name).add(values, drawn)


def scores_of(
    sums: Floats,
    auprc: Floats,
    others: Floats,
    other_auprc: Floats,
    recall: npt.NDArray[np.float32],
) -> tuple[Scores, Added]:
    """Compute scores and intervals from sums.

    Args:
        sums: sums of the programs, float64 [latents, 256, 15].
        auprc: their AUPRC, float64 [latents].
        others, other_auprc: the same of programs of other latents; NaN in AUPRC without any.
        recall: float32 [latents, 10].
    """
    by_cluster = np.ascontiguousarray(sums.transpose(1, 0, 2))  # [256, latents, 15]
    total = by_cluster.sum(0)
    values = figures_of_sums(total, auprc)
    drawn = resampled(by_cluster, lambda s: figures_of_sums(s, auprc), RESAMPLES)
    nothing = np.full_like(values, np.nan)
    low, high = (nothing, nothing) if drawn is None else percentiles(drawn)
    other = figures_of_sums(others.sum(1), other_auprc)
    other[np.isnan(other_auprc)] = np.nan
    positives = total[:, POSITIVE].round().astype(np.int64)
    enough = positives >= MIN_POSITIVES
    paired = enough & ~np.isnan(other_auprc)
    other_drawn = constant_drawn = None
    if paired.any():
        some = others[paired].transpose(1, 0, 2)
        other_drawn = resampled(some, lambda s: figures_of_sums(s, other_auprc[paired]), FEW)
    if enough.any():
        constant_drawn = resampled(by_cluster[:, enough, : POSITIVE + 1], _constant, FEW)
    rows = round(total[0, N]) if len(total) else 0
    return Scores(values, low, high, other, recall, positives, rows), Added(
        (values[enough], None if drawn is None else drawn[:, enough]),
        (other[paired], other_drawn),
        (_constant(total[enough]), constant_drawn),
    )


def _constant(sums: Floats) -> Floats:
    """Compute the metrics of a program that predicts the same, and a firing, on every row."""
    share = sums[..., POSITIVE] / sums[..., N]
    found = np.zeros((*sums.shape[:-1], len(METRICS)))
    found[..., METRICS.index("precision")] = found[..., METRICS.index("auprc")] = share
    found[..., METRICS.index("recall")] = 1
    found[..., METRICS.index("f1")] = 2 * share / (1 + share)
    found[share == 0] = np.nan
    return found
