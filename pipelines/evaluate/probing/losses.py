"""The probe loss of tasks, on the examples it was fitted to and on those of other documents."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from sae_harvest.pipelines.evaluate.intervals import CLUSTERS, Floats, interval
from sae_harvest.pipelines.evaluate.probing.examples import Examples
from sae_harvest.pipelines.evaluate.probing.newton import (
    ABSENT,
    BIAS,
    THRESHOLD,
    WEIGHT,
)
from sae_harvest.pipelines.evaluate.probing.survey import Best, Labelling


@dataclass(frozen=True, eq=False)
class TaskLosses:
    """Loss of the best latent of each task."""

    best: Best
    """The latents; the first of each task is the one that is scored."""
    sums: Floats
    """float64 [256, tasks, 2]: loss in nats and weight of the scored examples, by cluster."""

    @property
    def loss(self) -> Floats:
        """Mean loss in nats per example [tasks]."""
        return mean_loss(self.sums.sum(0))

    @property
    def limits(self) -> tuple[Floats, Floats]:
        """95 % interval of the loss of each task [tasks]; the fits are not repeated."""
        return interval(self.sums, mean_loss) or _no_limits(self.sums.shape[1])


def mean_loss(sums: Floats) -> Floats:
    """Return loss over weight, of sums [..., 2]; NaN without weight."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return sums[..., 0] / sums[..., 1]


def score(
    best: Best,
    values: Mapping[int, npt.NDArray[np.float32]],
    examples: Examples,
    fitted: Labelling,
    scored: Labelling,
) -> TaskLosses:
    """Score the best latent of each task.

    A probability of a class is at least 1 / (n + 2), with n the number of examples of the fit, when
    other examples than those are scored: n examples allow no more certainty (rule of succession),
    and a fit with an infinite weight would otherwise have an infinite loss.

    Args:
        best: the fits.
        values: values of the latents on the examples, float32 [examples] each.
        examples: the examples.
        fitted: the classes that the latents were fitted to.
        scored: the classes to score; `fitted` itself, or those of other examples.
    """
    sums = np.zeros((CLUSTERS, len(examples.names), 2))
    counts = fitted.counts
    for t in range(len(examples.names)):
        inside = np.flatnonzero(scored.codes[:, t] != ABSENT)
        y = scored.codes[inside, t]
        z = values[int(best.latent[t, 0])][inside].astype(np.float64)
        least = 0.0 if scored is fitted else 1 / (counts[t].sum() + 2)
        loss = cross_entropy(log_odds(z, best.fit[t, 0]), y, least)
        _add(sums[:, t], examples.cluster[inside], loss, scored.class_weights[t][y])
    return TaskLosses(best, sums)


def score_constant(examples: Examples, fitted: Labelling, scored: Labelling) -> TaskLosses:
    """Score the predictor that gives every example the share of positive ones in `fitted`."""
    sums = np.zeros((CLUSTERS, len(examples.names), 2))
    weight = fitted.counts * fitted.class_weights
    odds = np.log(weight[:, 1]) - np.log(weight[:, 0])
    for t in range(len(examples.names)):
        inside = np.flatnonzero(scored.codes[:, t] != ABSENT)
        y = scored.codes[inside, t]
        loss = cross_entropy(np.full(len(y), odds[t]), y, 0.0)
        _add(sums[:, t], examples.cluster[inside], loss, scored.class_weights[t][y])
    return TaskLosses(Best.empty(len(examples.names)), sums)


def _add(sums: Floats, cluster: npt.NDArray[np.int64], loss: Floats, weight: Floats) -> None:
    """Add weighted losses [examples] to sums [256, 2]."""
    np.add.at(sums, cluster, np.stack([weight * loss, weight], axis=1))


def log_odds(z: Floats, fit: Floats) -> Floats:
    """Return the log-odds of the positive class, by a fit [5] of `newton.fit_all`."""
    weight, bias, above = fit[WEIGHT], fit[BIAS], z - fit[THRESHOLD]
    if np.isfinite(weight):
        return weight * above + bias
    return np.where(above > 0, weight, np.where(above < 0, -weight, bias))


def cross_entropy(odds: Floats, y: npt.NDArray[np.uint8], least: float) -> Floats:
    """Return the cross-entropy in nats of labels given log-odds, probabilities at least `least`."""
    signed = np.where(y == 1, odds, -odds)
    probability = 1 / (1 + np.exp(-np.abs(signed)))
    loss = np.where(signed > 0, -np.log(probability), np.logaddexp(0, -signed))
    return np.minimum(loss, -np.log(least)).clip(-np.log1p(-least)) if least > 0 else loss


def _no_limits(n: int) -> tuple[Floats, Floats]:
    return np.full(n, np.nan), np.full(n, np.nan)
