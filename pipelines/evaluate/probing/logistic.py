"""Logistic regression on several features, with a quadratic penalty chosen on training examples.

Features are divided by their standard deviation. With n examples of total weight 1, the loss is

    sum of weight * cross-entropy + penalty / 2 * |w|^2

The other training documents are fitted with falling penalties until the loss on a quarter of the
training documents rises; then all of them are fitted with the penalty before that.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
PENALTIES = (1.0, 0.1, 0.01, 0.001, 0.0001)  # the strongest first: each fit starts from the last
INNER_CLUSTERS = 4  # every fourth cluster of documents decides about the penalty
MAX_STEPS, PRECISION = 100, 1e-9


@dataclass(frozen=True, eq=False)
class Probe:
    """A linear probe: log-odds are x . weights + bias."""

    weights: Floats
    """float64 [features]."""
    bias: float
    """Bias."""
    penalty: float
    """The chosen penalty."""

    def log_odds(self, x: Floats) -> Floats:
        """Return the log-odds of the positive class of x [examples, features]."""
        return x @ self.weights + self.bias


def fit_probe(
    x: Floats, y: npt.NDArray[np.uint8], weight: Floats, cluster: npt.NDArray[np.int64]
) -> Probe:
    """Fit a probe to training examples.

    Args:
        x: float64 [examples, features].
        y: uint8 [examples], 0 or 1.
        weight: float64 [examples].
        cluster: int64 [examples], cluster of each example's document.
    """
    centre = weight @ x / weight.sum()
    spread = np.sqrt(weight @ np.square(x - centre) / weight.sum())
    used = spread > 1e-12 * np.maximum(np.abs(centre), 1e-30)
    scaled = (x[:, used] - centre[used]) / spread[used]
    inner = cluster % INNER_CLUSTERS == 0
    chosen = 2  # a middle one, if a class is missing in one of the parts
    if all(np.unique(y[part]).size == 2 for part in (inner, ~inner)):
        lowest = np.inf
        for number, fitted in enumerate(_path(scaled[~inner], y[~inner], weight[~inner])):
            odds = scaled[inner] @ fitted[:-1] + fitted[-1]
            loss = float(weight[inner] @ _cross_entropy(odds, y[inner]))
            if loss > lowest:
                break
            lowest, chosen = loss, number
    *_, best = islice(_path(scaled, y, weight), chosen + 1)
    weights = np.zeros(x.shape[1])
    weights[used] = best[:-1] / spread[used]
    return Probe(weights, float(best[-1] - centre @ weights), PENALTIES[chosen])


def _path(x: Floats, y: npt.NDArray[np.uint8], weight: Floats) -> Iterator[Floats]:
    """Yield weights and bias, float64 [features + 1], for each penalty."""
    n, d = x.shape
    turned = None
    if n < d:  # the weights are sums of examples, so n numbers are enough
        u, s, turned = np.linalg.svd(x, full_matrices=False)
        x = u * s
    given = np.column_stack([x, np.ones(n)])
    weight = weight / weight.sum()
    share = weight[y == 1].sum()
    solution = np.zeros(given.shape[1])
    solution[-1] = np.log(share) - np.log(1 - share)
    for penalty in PENALTIES:
        solution = _newton(given, y, weight, penalty, solution)
        weights = solution[:-1] if turned is None else solution[:-1] @ turned
        yield np.append(weights, solution[-1])


def _newton(
    x: Floats, y: npt.NDArray[np.uint8], weight: Floats, penalty: float, start: Floats
) -> Floats:
    """Minimise the loss of x [examples, features + 1]; the last feature is 1, without penalty."""
    ridge = np.append(np.full(x.shape[1] - 1, penalty), 0.0)

    def loss_of(solution: Floats) -> float:
        return float(weight @ _cross_entropy(x @ solution, y) + ridge @ np.square(solution) / 2)

    solution, loss = start, loss_of(start)
    for _ in range(MAX_STEPS):
        share = 0.5 + 0.5 * np.tanh(x @ solution / 2)  # the logistic function
        gradient = x.T @ (weight * (share - y)) + ridge * solution
        curve = np.maximum(weight * share * (1 - share), 1e-300)
        hessian = (x * curve[:, None]).T @ x
        hessian[np.diag_indices_from(hessian)] += ridge + 1e-12
        step = -np.linalg.solve(hessian, gradient)
        decrease = -float(gradient @ step)
        if decrease < 2 * PRECISION:
            return solution + step
        size = 1.0
        while (trial := loss_of(solution + size * step)) > loss - 1e-4 * size * decrease:
            size /= 2
            if size < 1e-9:
                return solution
        solution, loss = solution + size * step, trial
    return solution


def _cross_entropy(odds: Floats, y: npt.NDArray[np.uint8]) -> Floats:
    return np.logaddexp(0, np.where(y == 1, -odds, odds))
