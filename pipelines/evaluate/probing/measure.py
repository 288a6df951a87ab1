"""All probes of the tasks of one unit, documents or rows: of latents and of the baselines."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from sae_harvest.pipelines.evaluate.figures import SAE_ITSELF
from sae_harvest.pipelines.evaluate.probing.examples import Examples
from sae_harvest.pipelines.evaluate.probing.losses import TaskLosses, score, score_constant
from sae_harvest.pipelines.evaluate.probing.newton import ABSENT
from sae_harvest.pipelines.evaluate.probing.pooling import DenseColumns, Pooling, StoredFirings
from sae_harvest.pipelines.evaluate.probing.sparse import (
    CHANNELS,
    KS,
    PCA,
    Sample,
    SparseProbe,
    dense_probes,
    drawn_only,
    principal_components,
    samples,
    sparse_probes,
)
from sae_harvest.pipelines.evaluate.probing.survey import (
    Features,
    Labelling,
    fit_best,
    largest_differences,
    values_of,
)
from sae_harvest.pipelines.evaluate.probing.table import ALL, TEST, TRAIN

SHUFFLED_LABELS, CONSTANT = "shuffled labels", "constant"
Progress = Callable[[str, int, int], None]  # stage, amount done, amount in all
Key = tuple[str, str]  # method; documents that the probe is scored on
Values = Mapping[int, npt.NDArray[np.float32]]


@dataclass(frozen=True, eq=False)
class Measured:
    """The probes of the tasks of one unit."""

    examples: Examples
    """The examples."""
    losses: dict[Key, TaskLosses]
    """Losses of the best single latents and of baselines, by method and scored documents."""
    sparse: list[SparseProbe]
    """k-sparse probes and dense probes."""
    drawn: list[Sample]
    """Examples of each task on which the sparse and dense probes were fitted and scored."""


@dataclass(frozen=True)
class Settings:
    """The settings of probes."""

    pooling: Pooling
    """Pooling of the values of a document's rows."""
    n_best: int
    """Latents of each task that are listed."""
    seed: int
    """Seed of drawn examples and shuffled labels."""


def measure(
    examples: Examples,
    firings: Mapping[str, StoredFirings],
    channels: Callable[[npt.NDArray[np.int64]], npt.NDArray[np.float32]],
    settings: Settings,
    progress: Progress,
) -> Measured:
    """Fit and score all probes of the tasks.

    Args:
        examples: the examples of the tasks.
        firings: the firings of the SAE, and of a random one, by name.
        channels: returns channels of some examples, given their numbers, float32 [some, d].
        settings: pooling, number of listed latents, seed.
        progress: called with a stage, the amount done, the amount in all.
    """
    found = Measured(examples, {}, [], samples(examples, settings.seed))
    numbers, few, drawn = drawn_only(examples, found.drawn)
    x = channels(numbers)
    matrices = {CHANNELS: x, PCA: principal_components(x, _in_training(few))}
    labellings = labellings_of(examples, examples)
    for scored, fitted in ((ALL, ALL), (TEST, TRAIN)):
        constant = score_constant(examples, labellings[fitted], labellings[scored])
        found.losses[CONSTANT, scored] = constant
    chosen: dict[str, npt.NDArray[np.int64]] = {}
    values: dict[str, Values] = {}
    for name, features in firings.items():
        chosen[name] = largest_differences(
            features, examples, settings.pooling, labellings[TRAIN].codes, max(KS)
        )
        given = dict(labellings)
        if name == SAE_ITSELF:
            given[SHUFFLED_LABELS] = labellings[ALL].shuffled(settings.seed)
        known = add_single_latents(
            found, name, features, examples, given, chosen[name], settings, progress
        )
        values[name] = {latent: known[latent][numbers] for latent in np.unique(chosen[name])}
    for name, matrix in matrices.items():
        columns, train = DenseColumns(matrix), few.part(test=False)
        chosen[name] = largest_differences(columns, few, settings.pooling, train, max(KS))
        values[name] = dict(enumerate(np.ascontiguousarray(matrix.T)))
    weighted, none = labellings_of(few, examples), np.empty(0, np.int64)
    add_single_latents(found, CHANNELS, DenseColumns(x), few, weighted, none, settings, progress)
    n_tasks = len(examples.names)
    for what, probes in (
        ("sparse probes", sparse_probes(few, drawn, chosen, values)),
        ("dense probes", dense_probes(few, drawn, x)),
    ):
        for probe in probes:
            found.sparse.append(probe)
            progress(f"{what}, {examples.unit}", probe.task + 1, n_tasks)
    return found


def labellings_of(examples: Examples, population: Examples) -> dict[str, Labelling]:
    """Return the classes of all, of training and of test examples, by name.

    Classes are weighted so that they have the shares that they have in the population.
    """
    parts = {
        ALL: (examples.codes, population.codes),
        TRAIN: (examples.part(test=False), population.part(test=False)),
        TEST: (examples.part(test=True), population.part(test=True)),
    }
    return {name: Labelling.weighted(*codes) for name, codes in parts.items()}


def add_single_latents(
    found: Measured,
    name: str,
    features: Features,
    examples: Examples,
    labellings: Mapping[str, Labelling],
    others: npt.NDArray[np.int64],
    settings: Settings,
    progress: Progress,
) -> Values:
    """Add the losses of the best latents; return the values of these and of other latents."""
    fits = [part for part in (ALL, TRAIN, SHUFFLED_LABELS) if part in labellings]
    best = dict(
        zip(
            fits,
            fit_best(
                features,
                examples,
                settings.pooling,
                [labellings[part] for part in fits],
                settings.n_best,
                lambda done, total: progress(f"{name}, {examples.unit}", done, total),
            ),
            strict=True,
        )
    )
    wanted = [fit.latent[:, 0] for fit in best.values()]
    values = values_of(
        features, examples, settings.pooling, np.concatenate([*wanted, others.ravel()])
    )
    every, train, test = labellings[ALL], labellings[TRAIN], labellings[TEST]
    found.losses[name, ALL] = score(best[ALL], values, examples, every, every)
    found.losses[name, TEST] = score(best[TRAIN], values, examples, train, test)
    if SHUFFLED_LABELS in best:
        shuffled = labellings[SHUFFLED_LABELS]
        found.losses[SHUFFLED_LABELS, ALL] = score(
            best[SHUFFLED_LABELS], values, examples, shuffled, shuffled
        )
    return values


def _in_training(examples: Examples) -> npt.NDArray[np.bool_]:
    """Return a mask of the examples that are training examples of a task."""
    return (examples.part(test=False) != ABSENT).any(axis=1)
