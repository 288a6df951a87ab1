"""The forms of scaling laws: losses as functions of latents, sparsity or compute, in logarithms.

    PowerLaw     L(n) = e + a n^-b          (also L(C), with compute C for n)
    JointLaw     L(n, k) = exp(alpha + beta_k ln k + beta_n ln n + gamma ln k ln n)
                           + exp(zeta + eta ln k)

Both from Gao et al. 2024 ("Scaling and evaluating sparse autoencoders"), section 3.1; e and
exp(zeta + eta ln k) are the irreducible loss. Laws are fitted in centred
coordinates, which are nearly independent, and reported in the parameters above.
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
FRACTIONS = (1e-4, 0.2, 0.4, 0.6, 0.8, 0.95)  # first guesses of e, as shares of the least loss
MIN_FRACTION = 1e-6  # e below this share of the least loss counts as 0
MIN_B, MAX_B = 1e-4, 5.0  # exponents outside mean no slope, or a cliff


class Law(Protocol):
    """A law with p coordinates. Sets of coordinates are evaluated together: [sets, p]."""

    least: Array  # [p], lower bounds of the coordinates
    most: Array  # [p], upper bounds

    def log_loss(self, theta: Array) -> tuple[Array, Array]:
        """Return the log loss [sets, points] at the law's points, and its derivative [.., p]."""

    def starts(self, log_loss: Array) -> Array:
        """Return initial coordinates [sets, p] for log losses [points]."""

    def parameters(self, theta: Array) -> dict[str, Array]:
        """Return the parameters by their names above, [sets] each."""

    def at(self, points: Any) -> Law:
        """Return the same law with the same centre at other points."""


class PowerLaw:
    """L(x) = e + a x^-b with e >= 0 and b > 0.

    Coordinates: ln e, ln (a c^-b) and ln b, where c is the geometric mean of the first points.
    Points are positive, [points].
    """

    def __init__(self, x: Array, centre: float | None = None, least: float = -np.inf) -> None:
        self._centre = float(np.log(x).mean()) if centre is None else centre
        self._z = np.log(x) - self._centre  # [points]
        self.least = np.array([least, -np.inf, np.log(MIN_B)])
        self.most = np.array([np.inf, np.inf, np.log(MAX_B)])

    def log_loss(self, theta: Array) -> tuple[Array, Array]:
        floor, slope = theta[:, :1], np.exp(theta[:, 2:])  # [sets, 1]
        falling = theta[:, 1:2] - slope * self._z  # [sets, points]
        total = np.logaddexp(floor, falling)
        share = np.exp(falling - total)
        parts = (np.exp(floor - total), share, -slope * self._z * share)
        return total, np.stack(parts, -1)

    def starts(self, log_loss: Array) -> Array:
        least = float(np.exp(log_loss.min()))
        self.least[0] = np.log(least * MIN_FRACTION)
        found = []
        for fraction in FRACTIONS:
            rest = np.log(np.exp(log_loss) - fraction * least)  # ln a - b ln x
            slope, level = np.polyfit(self._z, rest, 1)
            found.append((np.log(fraction * least), level, np.log(max(-slope, 1e-3))))
        return np.array(found)

    def parameters(self, theta: Array) -> dict[str, Array]:
        b = np.exp(theta[:, 2])
        return {
            "e": np.exp(theta[:, 0]),
            "a": np.exp(np.minimum(theta[:, 1] + b * self._centre, 700.0)),  # stays finite
            "b": b,
        }

    def at(self, points: Any) -> PowerLaw:
        return PowerLaw(np.asarray(points, float), self._centre, float(self.least[0]))


class JointLaw:
    """L(n, k) as above. Points are [points, 2], latents and k, positive.

    Coordinates: alpha, beta_k, beta_n, gamma, zeta, eta with ln n and ln k about their means.
    """

    def __init__(
        self, points: Array, centre: tuple[float, float] | None = None, least: float = -np.inf
    ) -> None:
        logs = np.log(points)  # [points, 2]
        self._centre = centre or (float(logs[:, 0].mean()), float(logs[:, 1].mean()))
        n, k = logs[:, 0] - self._centre[0], logs[:, 1] - self._centre[1]
        one = np.ones_like(n)
        self._falling = np.stack((one, k, n, k * n), -1)  # [points, 4]
        self._floor = np.stack((one, k), -1)  # [points, 2]
        self.least = np.array([-np.inf] * 4 + [least, -np.inf])
        self.most = np.full(6, np.inf)

    def log_loss(self, theta: Array) -> tuple[Array, Array]:
        falling = theta[:, :4] @ self._falling.T  # [sets, points]
        floor = theta[:, 4:] @ self._floor.T
        total = np.logaddexp(falling, floor)
        shares = np.exp(falling - total)[..., None], np.exp(floor - total)[..., None]
        return total, np.concatenate((shares[0] * self._falling, shares[1] * self._floor), axis=-1)

    def starts(self, log_loss: Array) -> Array:
        loss = np.exp(log_loss)
        self.least[4] = np.log(loss.min() * MIN_FRACTION)
        design = self._floor
        found = []
        trend = np.linalg.lstsq(design, log_loss, rcond=None)[0][1]  # loss against k alone
        for fraction in FRACTIONS:
            for eta in (0.0, trend):
                # the highest floor of that slope below every loss
                zeta = np.log(fraction) + float((log_loss - eta * design[:, 1]).min())
                rest = np.log(loss - np.exp(zeta + eta * design[:, 1]))
                first = np.linalg.lstsq(self._falling, rest, rcond=None)[0]
                found.append((*first, zeta, eta))
        return np.array(found)

    def parameters(self, theta: Array) -> dict[str, Array]:
        alpha, beta_k, beta_n, gamma, zeta, eta = theta.T
        n, k = self._centre
        return {
            "alpha": alpha - beta_k * k - beta_n * n + gamma * k * n,
            "beta_k": beta_k - gamma * n,
            "beta_n": beta_n - gamma * k,
            "gamma": gamma,
            "zeta": zeta - eta * k,
            "eta": eta,
        }

    def at(self, points: Any) -> JointLaw:
        return JointLaw(np.asarray(points, float), self._centre, float(self.least[4]))
