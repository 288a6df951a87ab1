"""All latents against all tasks: the best fits, and the largest differences between classes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np
import numpy.typing as npt

from sae_harvest.common.cache import use_numba_cache
from sae_harvest.common.errors import RunError
from sae_harvest.pipelines.evaluate.probing.examples import Examples
from sae_harvest.pipelines.evaluate.probing.newton import (
    ABSENT,
    LOSS,
    MAX_STEPS,
    STEPS,
    Codes,
    fit_all,
)
from sae_harvest.pipelines.evaluate.probing.pooling import Pairs, Pooling

use_numba_cache()

from numba import njit, prange  # noqa: E402

Floats = npt.NDArray[np.float64]


class Features(Protocol):
    """Values of latents, or of what stands in their place, on examples."""

    @property
    def n_latents(self) -> int:
        """Return their number."""

    def pairs(self, examples: Examples, pooling: Pooling) -> Iterator[Pairs]:
        """Yield the values that are not 0, some latents at a time, in order."""


@dataclass(frozen=True, eq=False)
class Best:
    """The latents with the lowest losses of each task, the lowest first."""

    latent: npt.NDArray[np.int64]
    """int64 [tasks, best]."""
    fit: Floats
    """float64 [tasks, best, 5]; see `newton.fit_all`."""

    @classmethod
    def empty(cls, n_tasks: int) -> Best:
        return cls(np.empty((n_tasks, 0), np.int64), np.empty((n_tasks, 0, 5)))

    def limits(self, n_best: int) -> Floats:
        """Return the loss of the last of so many latents; infinite if there are fewer [tasks]."""
        if self.latent.shape[1] < n_best:
            return np.full(len(self.latent), np.inf)
        return self.fit[:, n_best - 1, LOSS].copy()

    def merged(self, first: int, fits: Floats, n_best: int) -> Best:
        """Add the fits [latents, tasks, 5] of the latents from `first` on; ties: lower first."""
        latents = np.arange(first, first + len(fits))
        latent = np.hstack([self.latent, np.tile(latents, (len(self.latent), 1))])
        fit = np.concatenate([self.fit, fits.transpose(1, 0, 2)], axis=1)
        order = np.argsort(fit[:, :, LOSS], axis=1, kind="stable")[:, :n_best]
        return Best(
            np.take_along_axis(latent, order, axis=1),
            np.take_along_axis(fit, order[:, :, None], axis=1),
        )


@dataclass(frozen=True, eq=False)
class Labelling:
    """Classes of examples, and the weight of each class."""

    codes: Codes
    """uint8 [examples, tasks]."""
    class_weights: Floats
    """float64 [tasks, 2], weight of an example of each class."""

    @classmethod
    def unweighted(cls, codes: Codes) -> Labelling:
        return cls(codes, np.ones((codes.shape[1], 2)))

    @classmethod
    def weighted(cls, codes: Codes, population: Codes) -> Labelling:
        """Weigh the classes of a sample so that they have their shares of the population."""
        sampled, every = (cls.unweighted(c).counts for c in (codes, population))
        return cls(codes, every / np.maximum(sampled, 1))

    @cached_property
    def counts(self) -> npt.NDArray[np.int64]:
        """Examples of each class, int64 [tasks, 2]."""
        return np.stack([(self.codes == c).sum(0) for c in (0, 1)], axis=1)

    def shuffled(self, seed: int) -> Labelling:
        """Permute the labels of each task among its examples."""
        codes = self.codes.copy()
        for t, column in enumerate(codes.T):
            inside = np.flatnonzero(column != ABSENT)
            column[inside] = np.random.default_rng([seed, t]).permutation(column[inside])
        return Labelling(codes, self.class_weights)


def fit_best(
    features: Features,
    examples: Examples,
    pooling: Pooling,
    labellings: Sequence[Labelling],
    n_best: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Best]:
    """Fit every latent to every task, and keep the best latents of each.

    Args:
        features: values of the latents.
        examples: examples of the tasks.
        pooling: how values of a document's rows become one.
        labellings: several classes of the same examples.
        n_best: latents that are kept for each task.
        progress: called with the number of latents done, and their number.

    Returns:
        The best latents, for each labelling.
    """
    best = [Best.empty(len(examples.names)) for _ in labellings]
    for pairs in features.pairs(examples, pooling):
        for number, labelling in enumerate(labellings):
            fits = fit_all(
                pairs.starts,
                pairs.example,
                pairs.value,
                labelling.codes,
                labelling.counts,
                labelling.class_weights,
                best[number].limits(n_best),
            )
            if (fits[:, :, STEPS] >= MAX_STEPS).any():
                raise RunError(
                    "A probe has not converged; this is a fault of the program: please report it "
                    "with the name of the tables."
                )
            best[number] = best[number].merged(pairs.first, fits, n_best)
        progress(pairs.first + len(pairs.starts) - 1, features.n_latents)
    return best


def largest_differences(
    features: Features, examples: Examples, pooling: Pooling, codes: Codes, most: int
) -> npt.NDArray[np.int64]:
    """Find the latents whose means over the two classes differ most, without regard to sign.

    A difference is divided by the root of the mean of the two variances within the classes.
    Without that, dense latents with large values would be chosen for nearly every task.

    Returns:
        int64 [tasks, most], the largest difference first; ties: lower latent first.
    """
    counts = np.maximum(Labelling.unweighted(codes).counts, 1)
    found: list[Floats] = []
    for pairs in features.pairs(examples, pooling):
        sums = _class_sums(pairs.starts, pairs.example, pairs.value, codes)
        means, squares = sums[..., 0] / counts, sums[..., 1] / counts  # [latents, tasks, 2]
        spread = np.sqrt(np.maximum(squares - means**2, 0).mean(axis=2))
        difference = np.abs(means[:, :, 1] - means[:, :, 0])
        with np.errstate(divide="ignore", invalid="ignore"):
            found.append(np.where(difference > 0, difference / spread, 0))
    ratio = np.concatenate(found)  # [latents, tasks]
    return np.argsort(-ratio, axis=0, kind="stable")[:most].T.copy()


@njit(parallel=True, nogil=True, cache=True)
def _class_sums(
    starts: npt.NDArray[np.int64],
    example: npt.NDArray[np.int32],
    value: npt.NDArray[np.float32],
    codes: Codes,
) -> Floats:
    """Sum each latent's values, and their squares, over the examples of each class.

    Returns:
        float64 [latents, tasks, 2 classes, 2].
    """
    n_tasks = codes.shape[1]
    sums = np.zeros((len(starts) - 1, n_tasks, 2, 2))
    for i in prange(len(starts) - 1):
        for p in range(starts[i], starts[i + 1]):
            for t in range(n_tasks):
                code = codes[example[p], t]
                if code != ABSENT:
                    sums[i, t, code, 0] += value[p]
                    sums[i, t, code, 1] += np.float64(value[p]) ** 2
    return sums


def values_of(
    features: Features,
    examples: Examples,
    pooling: Pooling,
    latents: npt.NDArray[np.int64],
) -> dict[int, npt.NDArray[np.float32]]:
    """Return the values of some latents on all examples, float32 [examples] each."""
    wanted = np.unique(latents)
    found = {}
    for pairs in features.pairs(examples, pooling):
        last = pairs.first + len(pairs.starts) - 1
        for latent in wanted[(wanted >= pairs.first) & (wanted < last)].tolist():
            here = slice(*pairs.starts[latent - pairs.first :][:2])
            z = np.zeros(len(examples), np.float32)
            z[pairs.example[here]] = pairs.value[here]
            found[latent] = z
    return found
