"""Robust least squares in log space, for many data sets at once, and intervals by bootstrap.

A fit minimises Huber's loss of the differences of logarithms by the Levenberg-Marquardt iteration.
The scale of the differences is estimated together with it (Huber 1981, proposal 2). Intervals come
from a parametric bootstrap: data are drawn around the fitted law and fitted again. The scale of
each draw is drawn too, s * sqrt(df / chi-square(df)), so few points give wide intervals, as
Student's t does.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from sae_harvest.train.scaling.laws import Array, Law

HUBER = 1.345  # in units of the scale; 95 % as efficient as squares for Gaussian noise
HUBER_SQUARE = 0.71016  # E[min(|z|, HUBER)^2] of a standard Gaussian z
SCALE_ROUNDS = 20
ITERATIONS = 400
TOLERANCE = 1e-15  # least share of the cost that a step must gain
PERFECT = 1e-9  # differences of logarithms within rounding
LEVEL = 0.95
DRAWS = 1000


@dataclass(frozen=True)
class Fit:
    """A law fitted to points."""

    law: Law
    """The law at the fitted points."""
    theta: Array
    """Fitted coordinates, [p]."""
    draws: Array
    """Coordinates of the bootstrap, [draws, p]."""
    r2: float
    """Explained share of the variance of the log loss."""
    scale: float
    """Scale of the residuals, in units of ln loss."""
    points: int
    """Number of points."""

    def predict(self, points: Any) -> Array:
        """Return the predicted losses at points, [points]."""
        return np.exp(self.law.at(points).log_loss(self.theta[None])[0][0])

    def band(self, points: Any) -> tuple[Array, Array]:
        """Return the lower and upper end of the law's interval at each point, [points] each."""
        losses = self.law.at(points).log_loss(self.draws)[0]  # [draws, points]
        low, high = np.quantile(losses, _ends(), axis=0)
        return np.exp(low), np.exp(high)

    def to_json(self) -> dict[str, Any]:
        """Return the parameters with their intervals, and the quality of the fit."""
        draws = self.law.parameters(self.draws)
        return {
            "parameters": {
                name: {
                    "value": float(value[0]),
                    "low": float(np.quantile(draws[name], _ends()[0])),
                    "high": float(np.quantile(draws[name], _ends()[1])),
                }
                for name, value in self.law.parameters(self.theta[None]).items()
            },
            "r2": self.r2,
            "scale": self.scale,
            "points": self.points,
            "level": LEVEL,
        }


def fit(law: Law, loss: Array, draws: int = DRAWS, seed: int = 0) -> Fit:
    """Fit a law to losses at its points.

    Args:
        law: the law at the points; it needs more points than coordinates.
        loss: losses, positive, [points].
        draws: number of draws of the bootstrap.
        seed: seed of the draws.
    """
    target = np.log(loss)  # [points]
    theta, freedom = _best(law, target)
    scale = _scale(law, theta, target, np.inf, freedom)
    for _ in range(SCALE_ROUNDS):
        if scale <= PERFECT:
            break
        theta = _solve(law, theta[None], target[None], np.array([HUBER * scale]))[0]
        before, scale = scale, _scale(law, theta, target, HUBER * scale, freedom)
        if abs(scale - before) <= 1e-6 * before:
            break
    fitted = law.log_loss(theta[None])[0][0]  # [points]
    rng = np.random.default_rng(seed)
    scales = scale * np.sqrt(freedom / rng.chisquare(freedom, draws))  # [draws]
    data = fitted + scales[:, None] * rng.standard_normal((draws, len(target)))
    found = _solve(law, np.repeat(theta[None], draws, 0), data, HUBER * scales)
    spread = float(np.square(target - target.mean()).sum())
    rest = float(np.square(target - fitted).sum())
    return Fit(law, theta, found, 1 - rest / spread if spread else 1.0, scale, len(target))


def _ends() -> tuple[float, float]:
    return (1 - LEVEL) / 2, (1 + LEVEL) / 2


def _best(law: Law, target: Array) -> tuple[Array, int]:
    """Return the best least-squares fit over all starts, and its degrees of freedom."""
    starts = law.starts(target)
    copies = np.repeat(target[None], len(starts), 0)
    found = _solve(law, starts, copies, np.full(len(starts), np.inf))
    cost = np.square(law.log_loss(found)[0] - copies).sum(1)
    return found[int(np.argmin(cost))], len(target) - starts.shape[1]


def _scale(law: Law, theta: Array, target: Array, limit: float, freedom: int) -> float:
    """Return the scale of the residuals; larger residuals count as the limit."""
    rest = np.square(law.log_loss(theta[None])[0][0] - target)
    if np.isinf(limit):
        return float(np.sqrt(rest.sum() / freedom))
    return float(np.sqrt(np.minimum(rest, limit**2).sum() / (freedom * HUBER_SQUARE)))


def _cost(rest: Array, limit: Array) -> Array:
    """Return Huber's loss of residuals [sets, points], summed over points, [sets]."""
    size, limit = np.abs(rest), limit[:, None]
    inside = np.minimum(size, limit)
    return np.asarray((inside * (size - 0.5 * inside)).sum(1))


def _solve(law: Law, theta: Array, target: Array, limit: Array) -> Array:
    """Fit coordinates [sets, p] to targets [sets, points] by Levenberg-Marquardt."""
    theta = np.clip(theta, law.least, law.most)
    damping = np.full(len(theta), 1e-3)
    values, slopes = law.log_loss(theta)
    cost = _cost(values - target, limit)
    identity = np.eye(theta.shape[1])
    for _ in range(ITERATIONS):
        rest = values - target  # [sets, points]
        weight = np.minimum(1.0, limit[:, None] / np.maximum(np.abs(rest), 1e-300))
        heavy = slopes * weight[..., None]  # [sets, points, p]
        normal = np.einsum("snp,snq->spq", heavy, slopes)
        gradient = np.einsum("snp,sn->sp", heavy, rest)
        size = np.einsum("spp->sp", normal) + 1e-12
        system = normal + (damping[:, None] * size)[:, :, None] * identity
        step = np.linalg.solve(system, gradient[..., None])[..., 0]
        moved = np.clip(theta - step, law.least, law.most)
        new_values, new_slopes = law.log_loss(moved)
        new_cost = _cost(new_values - target, limit)
        better = new_cost < cost  # False where it is not a number
        gained = better & (cost - new_cost > TOLERANCE * cost)
        theta = np.where(better[:, None], moved, theta)
        values = np.where(better[:, None], new_values, values)
        slopes = np.where(better[:, None, None], new_slopes, slopes)
        cost = np.where(better, new_cost, cost)
        damping = np.clip(np.where(better, damping / 4, damping * 5), 1e-12, 1e12)
        if not np.any(gained | (damping < 1e8)):
            break
    return theta
