"""The rows of a synthetic store, drawn context by context.

With p_i the frequency of feature i, t_i the normal quantile of 1 - p_i, rho the correlation, u and
v standard normal for each group and document, and for each group and row, e for each feature and
row:

    a feature without parent fires where sqrt(rho / 2) (u + v) + sqrt(1 - rho) e > t_i
    child c of n fires where its parent fires and floor(n w / child_share) = c, w uniform
    magnitude m = exp(spread z - spread^2 / 2), z standard normal
    x = sum of m_i direction_i over firing features, + noise / sqrt(width) standard normal

Each context has its own stream of random numbers, so rows do not depend on the order in which
contexts are drawn.
"""

from __future__ import annotations

from math import sqrt
from statistics import NormalDist

import numpy as np
import numpy.typing as npt
import torch

from sae_harvest.train.sae.kernels import kernels_for
from sae_harvest.train.synthetic.config import CONTEXT_LENGTH, SyntheticConfig
from sae_harvest.train.synthetic.truth import CONTEXTS, Features, Firings


class Sampler:
    """Draws rows of given features."""

    def __init__(self, config: SyntheticConfig, features: Features) -> None:
        self._config, self._features = config, features
        roots = slice(config.n_roots)
        normal = NormalDist()
        limits = [normal.inv_cdf(1 - p) if p > 0 else np.inf for p in features.frequency[roots]]
        self._limits = np.array(limits, np.float32)
        self._group = features.group[roots]
        children = features.parent[config.n_roots :].reshape(-1, config.children)
        self._parents = children[:, 0]  # [parents]
        self._directions = torch.from_numpy(features.directions)
        self._kernels = kernels_for(torch.device("cpu"))

    def contexts(self, first: int, last: int) -> tuple[npt.NDArray[np.float32], Firings]:
        """Draw contexts [first, last).

        Returns:
            The rows, float32 [(last - first) * 128, width]; their firings, by row and feature.
        """
        rows, firings = zip(*map(self._context, range(first, last)), strict=True)
        together = Firings(
            *(
                np.concatenate([getattr(found, name) for found in firings])
                for name in ("row", "feature", "magnitude")
            )
        )
        return np.concatenate(rows), together

    def _context(self, number: int) -> tuple[npt.NDArray[np.float32], Firings]:
        config = self._config
        rng = np.random.default_rng([config.seed, CONTEXTS, number])
        row, feature = np.nonzero(self._fires(rng))
        z = rng.standard_normal(len(row), dtype=np.float32)
        spread = np.float32(config.spread)
        magnitude = np.exp(spread * z - spread * spread / 2)
        noise = rng.standard_normal((CONTEXT_LENGTH, config.width), dtype=np.float32)
        x = torch.from_numpy(noise * np.float32(config.noise / sqrt(config.width)))
        self._kernels.decode(*_padded(row, feature, magnitude), self._directions, x)
        firings = Firings(row + number * CONTEXT_LENGTH, feature, magnitude)
        return x.numpy(), firings

    def _fires(self, rng: np.random.Generator) -> npt.NDArray[np.bool_]:
        """Draw which features fire on the rows of a context, bool [128, features]."""
        config = self._config
        rho, n_roots = config.correlation, config.n_roots
        shape = CONTEXT_LENGTH, int(self._group.max()) + 1
        shared = rng.standard_normal(shape[1:], np.float32) + rng.standard_normal(shape, np.float32)
        score = rng.standard_normal((CONTEXT_LENGTH, n_roots), np.float32)
        score *= np.float32(sqrt(1 - rho))
        score += np.float32(sqrt(rho / 2)) * shared[:, self._group]
        fires = np.zeros((CONTEXT_LENGTH, config.features), np.bool_)
        np.greater(score, self._limits, out=fires[:, :n_roots])
        if config.parents and config.child_share:
            w = rng.random((CONTEXT_LENGTH, config.parents), np.float32)
            which = np.floor(w * np.float32(config.children / config.child_share))
            one = which[..., None] == np.arange(config.children)  # [rows, parents, children]
            one &= fires[:, self._parents, None]
            fires[:, n_roots:] = one.reshape(CONTEXT_LENGTH, -1)
        return fires


def _padded(
    row: npt.NDArray[np.int64], feature: npt.NDArray[np.int64], magnitude: npt.NDArray[np.float32]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the firings of a context as indices and values, both [128, most of a row]; -1: none.

    The firings are in the order of rows.
    """
    counts = np.bincount(row, minlength=CONTEXT_LENGTH)
    place = np.arange(len(row)) - np.repeat(np.cumsum(counts) - counts, counts)
    shape = CONTEXT_LENGTH, max(1, int(counts.max()))
    indices, values = np.full(shape, -1, np.int32), np.zeros(shape, np.float32)
    indices[row, place], values[row, place] = feature, magnitude
    return torch.from_numpy(indices), torch.from_numpy(values)
