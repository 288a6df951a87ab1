"""k-sparse probing: the k best features of each task, beside probes that read all channels.

Features are chosen and fitted on training documents and scored on test documents. Those are chosen
whose class means differ most, in units of the spread within the classes. (SAEBench does not divide
by the spread, which favours dense features with large values.) The methods:

    SAE               k latents
    random            k latents of a dictionary with random directions
    channels          k channels of the site
    PCA               k principal components of the training examples of all tasks
    mean difference   the direction from the mean of one class to the mean of the other
    all channels      every channel of the site
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from sae_harvest.pipelines.evaluate.intervals import CLUSTERS, Floats
from sae_harvest.pipelines.evaluate.probing.examples import Examples
from sae_harvest.pipelines.evaluate.probing.logistic import Probe, fit_probe
from sae_harvest.pipelines.evaluate.probing.newton import ABSENT
from sae_harvest.pipelines.evaluate.probing.scores import Scores, drawn_clusters, scores_of

CHANNELS, PCA, ALL, MEAN_DIFFERENCE = "channels", "PCA", "all channels", "mean difference"
KS = (1, 2, 5)
BLOCK = 4096  # examples whose products are summed at once
PER_CLASS = 512  # most training examples, and most test examples, of each class of a task


@dataclass(frozen=True, eq=False)
class Sample:
    """Examples of a task."""

    examples: npt.NDArray[np.int64]
    """Numbers of the examples, ascending [sampled]."""
    y: npt.NDArray[np.uint8]
    """Their classes [sampled]."""
    test: npt.NDArray[np.bool_]
    """Mask of those of test documents [sampled]."""

    @property
    def weight(self) -> Floats:
        """Weights with which both classes of the training examples have the same sum [sampled]."""
        train = self.y[~self.test]
        return np.array([1 / max(1, (train == c).sum()) for c in (0, 1)])[self.y]


@dataclass(frozen=True, eq=False)
class SparseProbe:
    """A probe of a task and its scores on test documents."""

    task: int
    """Number of the task."""
    method: str
    """The features."""
    features: npt.NDArray[np.int64]
    """Numbers of the features that were chosen; empty if the method chooses none."""
    probe: Probe
    """Weights and bias."""
    scores: Scores
    """AUC, F1, accuracy."""
    n_test: int
    """Number of test examples."""


def samples(examples: Examples, seed: int) -> list[Sample]:
    """Draw the examples of each task: at most 512 of each class, in training and in test."""
    found = []
    for t, column in enumerate(examples.codes.T):
        rng = np.random.default_rng([seed, t])
        parts = []
        for c in (0, 1):
            for test in (False, True):
                inside = np.flatnonzero((column == c) & (examples.test == test))
                drawn = rng.choice(inside, min(PER_CLASS, len(inside)), replace=False)
                parts.append(drawn)
        chosen = np.sort(np.concatenate(parts))
        found.append(Sample(chosen, column[chosen], examples.test[chosen]))
    return found


def drawn_only(
    examples: Examples, drawn: list[Sample]
) -> tuple[npt.NDArray[np.int64], Examples, list[Sample]]:
    """Return the drawn examples alone.

    Returns:
        Their numbers, ascending [some]; the examples; the samples, with places among these.
    """
    numbers = np.unique(np.concatenate([sample.examples for sample in drawn]))
    codes = np.full((len(numbers), len(drawn)), ABSENT, np.uint8)
    placed = []
    for t, sample in enumerate(drawn):
        at = np.searchsorted(numbers, sample.examples)
        codes[at, t] = sample.y
        placed.append(replace(sample, examples=at))
    return numbers, examples.taken(numbers, codes), placed


def principal_components(
    x: npt.NDArray[np.float32], train: npt.NDArray[np.bool_]
) -> npt.NDArray[np.float32]:
    """Return examples in the principal axes of the training examples, float32 [examples, d]."""
    mean = x[train].mean(0, dtype=np.float64)
    products = np.zeros((x.shape[1],) * 2)
    for rows in np.array_split(np.flatnonzero(train), max(1, int(train.sum()) // BLOCK)):
        centred = x[rows] - mean
        products += centred.T @ centred
    _, axes = np.linalg.eigh(products)
    turned = axes[:, ::-1].astype(np.float32)
    return x @ turned - (mean @ axes[:, ::-1]).astype(np.float32)


def sparse_probes(
    examples: Examples,
    drawn: list[Sample],
    chosen: Mapping[str, npt.NDArray[np.int64]],
    values: Mapping[str, Mapping[int, npt.NDArray[np.float32]]],
) -> Iterator[SparseProbe]:
    """Fit and score k-sparse probes, task by task.

    Args:
        examples: examples of the tasks.
        drawn: the sample of each task.
        chosen: by method, features int64 [tasks, at least 5], the best first.
        values: by method and feature, its values on all examples.
    """
    clusters = drawn_clusters(_used(examples.cluster))
    for t, sample in enumerate(drawn):
        for method, features in chosen.items():
            columns = [values[method][int(f)][sample.examples] for f in features[t, : max(KS)]]
            x = np.stack(columns, axis=1).astype(np.float64)
            for k in KS:
                probe, scores = _scored(x[:, :k], examples, sample, clusters)
                n_test = int(sample.test.sum())
                yield SparseProbe(t, method, features[t, :k], probe, scores, n_test)


def dense_probes(
    examples: Examples, drawn: list[Sample], x: npt.NDArray[np.float32]
) -> Iterator[SparseProbe]:
    """Fit and score probes that read all channels, task by task.

    Args:
        examples: examples of the tasks.
        drawn: the sample of each task.
        x: channels of the examples, float32 [examples, d].
    """
    clusters = drawn_clusters(_used(examples.cluster))
    none = np.empty(0, np.int64)
    for t, sample in enumerate(drawn):
        given = x[sample.examples].astype(np.float64)
        train = given[~sample.test]
        y = sample.y[~sample.test]
        direction = train[y == 1].mean(0) - train[y == 0].mean(0)
        n_test = int(sample.test.sum())
        probe, scores = _scored(given @ direction[:, None], examples, sample, clusters)
        along = Probe(probe.weights * direction, probe.bias, probe.penalty)
        yield SparseProbe(t, MEAN_DIFFERENCE, none, along, scores, n_test)
        probe, scores = _scored(given, examples, sample, clusters)
        yield SparseProbe(t, ALL, none, probe, scores, n_test)


def _scored(
    x: Floats, examples: Examples, sample: Sample, clusters: Floats
) -> tuple[Probe, Scores]:
    """Fit a probe to the training examples x [sampled, features], and score the others."""
    cluster = examples.cluster[sample.examples]
    train, test = ~sample.test, sample.test
    probe = fit_probe(x[train], sample.y[train], sample.weight[train], cluster[train])
    return probe, scores_of(probe.log_odds(x[test]), sample.y[test], cluster[test], clusters)


def _used(cluster: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
    used = np.zeros(CLUSTERS, np.bool_)
    used[cluster] = True
    return used
