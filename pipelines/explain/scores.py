"""Scores of explanations, with intervals over documents.

A score compares a prediction with the truth, for tokens or for excerpts:

    pearson             correlation over all tokens of all excerpts together; 0 for a constant
    explained_variance  1 - sum (y - s)^2 / sum (y - mean y)^2, with s in the units of y
    auprc               area under the precision-recall curve, as average precision: the mean over
                        true items of the precision at their threshold; ties count as one threshold
    f1                  of the items with a prediction above the threshold
    balanced_accuracy   mean of the shares of true and of false items that are told right

Intervals are a bootstrap that draws documents (see `evaluate.intervals`), 95 %. The draws depend
on the documents only, so that differences of two scores of the same items are paired.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from sae_harvest.pipelines.evaluate.intervals import RESAMPLES, Floats, draws, percentiles

Bools = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Score:
    """A value with its interval."""

    value: float | None
    """The value; None if it is not defined, such as a correlation without any firing."""

    low: float | None = None
    """Lower limit of its 95 % interval; None with fewer than two documents."""

    high: float | None = None
    """Upper limit of its 95 % interval."""


@dataclass(frozen=True, eq=False)
class Items:
    """Tokens or excerpts with the truth, and the document that each belongs to."""

    truth: Floats
    """Activation of a token; 1 or 0 for an excerpt that is one or is none [items]."""

    document: npt.NDArray[np.int64]
    """Number of its document [items]."""

    @property
    def is_true(self) -> Bools:
        """The items whose truth is above 0 [items]."""
        return self.truth > 0

    @cached_property
    def weights(self) -> Floats:
        """Times that each item is drawn: first once each, then in resamples [1 + resamples, items].

        Without two documents, only the first line.
        """
        names, of = np.unique(self.document, return_inverse=True)
        n = len(names)
        once = np.ones((1, len(self.truth)))
        if n < 2:
            return once
        return np.concatenate([once, draws(n, RESAMPLES, 0)[:, of]])

    def pearson(self, prediction: Floats) -> Floats:
        """Correlation of the truth and a prediction [1 + resamples]."""
        w, y, s = self.weights, self.truth, prediction
        n = w.sum(1)
        my, ms = w @ y / n, w @ s / n
        # squares of differences from the mean of all, so that no digits are lost
        y, s = y - my[0], s - ms[0]
        my, ms = w @ y / n, w @ s / n
        yy, ss, ys = w @ (y * y) / n - my**2, w @ (s * s) / n - ms**2, w @ (y * s) / n - my * ms
        tiny = 1e-12 * np.square(y).mean(), 1e-12 * np.square(s).mean()
        varies, known = ss > tiny[1], yy > tiny[0]
        both = np.sqrt(np.where(varies & known, yy * ss, 1.0))
        return np.where(known, np.where(varies, ys / both, 0.0), np.nan)

    def explained_variance(self, prediction: Floats) -> Floats:
        """Share of the truth's variance that a prediction explains [1 + resamples]."""
        w, n = self.weights, self.weights.sum(1)
        y = self.truth - self.truth.mean()
        variance = w @ (y * y) / n - (w @ y / n) ** 2
        error = w @ np.square(self.truth - prediction) / n
        where = variance > 1e-12 * np.square(y).mean()
        return 1 - np.divide(error, variance, out=np.full_like(error, np.nan), where=where)

    def auprc(self, prediction: Floats) -> Floats:
        """Average precision of a prediction [1 + resamples]."""
        order = np.argsort(-prediction, kind="stable")
        ends = np.flatnonzero(np.diff(prediction[order], append=-np.inf) != 0)  # of equal ones
        w = self.weights[:, order]
        hits = np.cumsum(w * self.is_true[order], axis=1)[:, ends]
        taken = np.cumsum(w, axis=1)[:, ends]
        precision = np.divide(hits, taken, out=np.zeros_like(hits), where=taken > 0)
        new = np.diff(hits, axis=1, prepend=0)
        total = hits[:, -1]
        found = (new * precision).sum(1)
        return np.divide(found, total, out=np.full_like(total, np.nan), where=total > 0)

    def f1(self, told: Bools) -> Floats:
        """F1 of the items that are told to be true [1 + resamples]."""
        both, right, all_told = self._counts(told)
        below = right + all_told
        return np.divide(
            2 * both, below, out=np.full_like(both, np.nan), where=(below > 0) & (right > 0)
        )

    def balanced_accuracy(self, told: Bools) -> Floats:
        """Mean of the accuracies of true and false items [1 + resamples]."""
        both, right, all_told = self._counts(told)
        wrong = self.weights.sum(1) - right
        nothing = np.full_like(both, np.nan)
        found = np.divide(both, right, out=nothing.copy(), where=right > 0)
        kept = np.divide(wrong - (all_told - both), wrong, out=nothing, where=wrong > 0)
        return (found + kept) / 2

    def _counts(self, told: Bools) -> tuple[Floats, Floats, Floats]:
        """Weights of items that are true and told, true, and told, each [1 + resamples]."""
        w = self.weights
        return w @ (told & self.is_true), w @ self.is_true, w @ told.astype(np.float64)


def score_of(values: Floats) -> Score:
    """Return the first value, with the 95 % interval of the others [1 + resamples]."""
    value = float(values[0]) if np.isfinite(values[0]) else None
    if value is None or len(values) == 1 or not np.isfinite(values[1:]).any():
        return Score(value)
    low, high = percentiles(values[1:])
    return Score(value, float(low), float(high))


Measures = dict[str, Callable[[Items, Floats, float], Floats]]

# metric → of items, their predictions and the threshold above which an item is told to be true
OF_TOKENS: Measures = {
    "pearson": lambda items, s, threshold: items.pearson(s),
    "explained_variance": lambda items, s, threshold: items.explained_variance(s),
    "auprc": lambda items, s, threshold: items.auprc(s),
}
OF_EXCERPTS: Measures = {
    "auprc": lambda items, s, threshold: items.auprc(s),
    "f1": lambda items, s, threshold: items.f1(s > threshold),
    "balanced_accuracy": lambda items, s, threshold: items.balanced_accuracy(s > threshold),
}
