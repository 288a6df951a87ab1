"""AUC, F1 and accuracy of a probe on test documents, with intervals over documents.

Both classes count with equal weight, so that figures of tasks with few and with many positive
examples can be compared: accuracy is the mean of the accuracies of the two classes (0.5 by chance),
F1 is 2 TPR / (1 + TPR + FPR) (2/3 if everything is called positive), and AUC is the probability
that a positive example scores higher than a negative one.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from sae_harvest.common.cache import use_numba_cache
from sae_harvest.pipelines.evaluate.intervals import CLUSTERS, RESAMPLES, Floats, percentiles

use_numba_cache()

from numba import njit  # noqa: E402

MEASURES = ("auc", "f1", "accuracy")


@dataclass(frozen=True, eq=False)
class Scores:
    """Scores of one probe."""

    values: Floats
    """float64 [3]: AUC, F1, accuracy."""
    resampled: Floats
    """float64 [resamples, 3]: the same for each draw of documents."""

    @property
    def limits(self) -> tuple[Floats, Floats]:
        """Lower and upper limits of the 95 % intervals, float64 [3] each."""
        return percentiles(self.resampled)


def drawn_clusters(used: npt.NDArray[np.bool_], seed: int = 0) -> Floats:
    """Draw clusters of documents with replacement.

    The same draws serve all probes, so that an interval of a mean over tasks can be computed.

    Args:
        used: bool [256], clusters that have examples.
        seed: seed of the draws.

    Returns:
        float64 [resamples, 256], how often each cluster is drawn.
    """
    n = int(used.sum())
    drawn = np.zeros((RESAMPLES, CLUSTERS))
    rng = np.random.default_rng(seed)
    drawn[:, used] = rng.multinomial(n, np.full(n, 1 / n), RESAMPLES)
    return drawn


def scores_of(
    odds: Floats, y: npt.NDArray[np.uint8], cluster: npt.NDArray[np.int64], drawn: Floats
) -> Scores:
    """Score log-odds; an example is called positive if its log-odds are above 0.

    Args:
        odds: float64 [examples].
        y: uint8 [examples], 0 or 1.
        cluster: int64 [examples].
        drawn: float64 [resamples, 256], weights of clusters; see `drawn_clusters`.
    """
    order = np.argsort(odds, kind="stable")
    pairs = np.zeros((CLUSTERS, CLUSTERS))
    _add_pairs(odds[order], y[order], cluster[order], pairs)
    counts = np.zeros((CLUSTERS, 4))  # of each class: examples, those called positive
    for c in (0, 1):
        np.add.at(counts[:, 2 * c], cluster[y == c], 1)
        np.add.at(counts[:, 2 * c + 1], cluster[(y == c) & (odds > 0)], 1)
    weights = np.vstack([np.ones(CLUSTERS), drawn])
    found = _measures((weights @ pairs * weights).sum(1), weights @ counts)
    return Scores(found[0], found[1:])


def _measures(pairs: Floats, counts: Floats) -> Floats:
    """Return AUC, F1, accuracy [..., 3], from ordered pairs [...] and counts [..., 4]."""
    negative, false, positive, true = (counts[..., i] for i in range(4))
    with np.errstate(invalid="ignore", divide="ignore"):
        fpr, tpr = false / negative, true / positive
        return np.stack(
            [pairs / (positive * negative), 2 * tpr / (1 + tpr + fpr), (tpr + 1 - fpr) / 2], axis=-1
        )


@njit(nogil=True, cache=True)
def _add_pairs(
    odds: Floats, y: npt.NDArray[np.uint8], cluster: npt.NDArray[np.int64], pairs: Floats
) -> None:
    """Count the pairs whose positive example scores higher, by the clusters of both.

    Args:
        odds: float64 [examples], ascending.
        y: uint8 [examples].
        cluster: int64 [examples].
        pairs: float64 [256, 256], changed: [cluster of the positive, of the negative]; equal scores
            count one half.
    """
    below = np.zeros(len(pairs))  # negative examples with a lower score
    first = 0
    while first < len(odds):
        last = first
        while last < len(odds) and odds[last] == odds[first]:
            last += 1
        for half in range(2):  # half of the equal ones, before and after the positives
            if half == 1:
                for j in range(first, last):
                    if y[j] == 1:
                        pairs[cluster[j]] += below
            for j in range(first, last):
                if y[j] == 0:
                    below[cluster[j]] += 0.5
        first = last
