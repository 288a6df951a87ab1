"""Answers of a language model, and predictions of floors, turned into scores of one latent."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from sae_harvest.pipelines.explain.client.interface import Failure, Read
from sae_harvest.pipelines.explain.excerpts import Excerpt
from sae_harvest.pipelines.explain.programs import LatentProgram
from sae_harvest.pipelines.explain.rendering import unit_of
from sae_harvest.pipelines.explain.scores import (
    OF_EXCERPTS,
    OF_TOKENS,
    Floats,
    Items,
    Measures,
    Score,
    score_of,
)
from sae_harvest.pipelines.explain.tasks import ACTIVE, INTRUDER, LISTED, Trial, expected
from sae_harvest.pipelines.features.reading.labels import SIMULATION

CONSTANT, SHUFFLED, OTHER = "constant", "shuffled labels", "another latent's explanation"
Judged = tuple[Items, Floats, float]  # items, predictions, threshold of a firing
EXPLANATION, BEFORE = "explanation", "before revision"


@dataclass(frozen=True)
class Scored:
    """One score of one subject."""

    subject: str
    """`explanation`, or a floor: a kind of program, constant, shuffled labels, another latent's
    explanation."""

    task: str
    """simulation, detection, fuzzing, intruder."""

    part: str
    """For a simulation: the active excerpts that it has; else the kind of the distractors."""

    metric: str
    """The metric."""

    score: Score
    """Value and interval."""

    items: int
    """Tokens or questions."""

    true_items: int
    """Tokens with a firing, or questions about active excerpts."""

    documents: int
    """Documents that they are from."""

    failed: int
    """Questions that have no answer and are left out."""


@dataclass(frozen=True, eq=False)
class Simulated:
    """Excerpts with their simulated levels; those whose request failed are left out."""

    excerpts: tuple[Excerpt, ...]
    """The excerpts."""

    levels: tuple[Floats, ...]
    """Expected level on each token, from 0 to 9."""

    failed: int
    """Number of excerpts without an answer."""

    @classmethod
    def of(cls, excerpts: Sequence[Excerpt], answers: Sequence[Read | Failure]) -> Simulated:
        """Pair excerpts with the answers to their requests."""
        pairs = [
            (excerpt, expected(answer))
            for excerpt, answer in zip(excerpts, answers, strict=True)
            if isinstance(answer, Read)
        ]
        found, levels = zip(*pairs, strict=True) if pairs else ((), ())
        return cls(tuple(found), tuple(levels), len(excerpts) - len(pairs))

    def chosen(self, wanted: Sequence[Excerpt]) -> Simulated:
        """Return some of the excerpts; those that failed count."""
        ids = {id(excerpt) for excerpt in wanted}
        pairs = [
            pair for pair in zip(self.excerpts, self.levels, strict=True) if id(pair[0]) in ids
        ]
        found, levels = zip(*pairs, strict=True) if pairs else ((), ())
        return Simulated(tuple(found), tuple(levels), len(wanted) - len(pairs))


def token_items(excerpts: Sequence[Excerpt]) -> Items:
    """Return all tokens of excerpts as items."""
    truth = [excerpt.activations for excerpt in excerpts]
    document = [np.full(len(excerpt.ids), excerpt.document) for excerpt in excerpts]
    return Items(
        np.concatenate([np.empty(0), *truth]).astype(np.float64),
        np.concatenate([np.empty(0, np.int64), *document]),
    )


def simulation_scores(
    part: str, simulated: Simulated, largest: float, programs: Sequence[LatentProgram], seed: int
) -> Iterator[Scored]:
    """Yield the scores of a simulation, and those of its floors on the same tokens.

    A level of 9 stands for the latent's largest activation in the store.

    Args:
        part: name of the group of excerpts.
        simulated: the excerpts with their simulated levels.
        largest: the latent's largest activation in the store.
        programs: the latent's programs.
        seed: seed of the permutation of labels.
    """
    excerpts = simulated.excerpts
    items = token_items(excerpts)
    prediction = np.concatenate([np.empty(0), *simulated.levels]) * unit_of(largest)
    shuffled = Items(np.random.default_rng(seed).permutation(items.truth), items.document)
    mean = np.full_like(prediction, items.truth.mean() if len(items.truth) else 0.0)
    subjects = {
        EXPLANATION: (items, prediction, 0.0),
        SHUFFLED: (shuffled, prediction, 0.0),
        CONSTANT: (items, mean, 0.0),
    }
    for program in programs:
        told = np.concatenate([np.empty(0), *map(program.predict, excerpts)])
        subjects[program.kind] = items, told, 0.0
    yield from _scored(SIMULATION, part, subjects, OF_TOKENS, simulated.failed)


def _scored(
    task: str, part: str, subjects: Mapping[str, Judged], measures: Measures, failed: int
) -> Iterator[Scored]:
    """Yield every metric of subjects: items with their predictions and a threshold."""
    for subject, (items, prediction, threshold) in subjects.items():
        for metric, measure in measures.items():
            n = len(items.truth)
            values = measure(items, prediction, threshold) if n else np.array([np.nan])
            yield Scored(
                subject, task, part, metric, score_of(values), n, int(items.is_true.sum()),
                len(np.unique(items.document)), failed,
            )  # fmt: skip


def trial_scores(
    task: str,
    trials: Sequence[Trial],
    answers: Sequence[Read | Failure],
    programs: Sequence[LatentProgram],
    seed: int,
) -> Iterator[Scored]:
    """Yield the scores of detection or fuzzing, for each kind of distractor, with their floors.

    Active excerpts are in every part; the distractors of a part are of one kind. Programs predict
    by their largest prediction on the tokens that the question is about.
    """
    pairs = list(zip(trials, answers, strict=True))
    for part in dict.fromkeys(trial.kind for trial in trials if trial.kind != ACTIVE):
        here = [(t, a) for t, a in pairs if t.kind in (ACTIVE, part)]
        known = [(trial, answer) for trial, answer in here if isinstance(answer, Read)]
        failed = len(here) - len(known)
        truth = np.array([trial.kind == ACTIVE for trial, _ in known], np.float64)
        items = Items(truth, np.array([t.excerpts[0].document for t, _ in known], np.int64))
        yes = np.array([answer.probability[0, 0] for _, answer in known])
        shuffled = Items(np.random.default_rng(seed).permutation(truth), items.document)
        subjects = {
            EXPLANATION: (items, yes, 0.5),
            SHUFFLED: (shuffled, yes, 0.5),
            CONSTANT: (items, np.ones(len(truth)), 0.5),
        }
        for program in programs:
            told = [program.predict(t.excerpts[0])[t.which].max(initial=0) for t, _ in known]
            below = np.nextafter(program.threshold, -np.inf)
            subjects[program.kind] = (items, np.array(told, np.float64), below)
        yield from _scored(task, part, subjects, OF_EXCERPTS, failed)


def intruder_scores(trials: Sequence[Trial], answers: Sequence[Read | Failure]) -> Iterator[Scored]:
    """Yield the share of lists in which the intruder was found, for each kind of intruder.

    The floor is the choice by chance, one in five.
    """
    pairs = list(zip(trials, answers, strict=True))
    for part in dict.fromkeys(trial.kind for trial in trials):
        here = [(trial, answer) for trial, answer in pairs if trial.kind == part]
        known = [(trial, answer) for trial, answer in here if isinstance(answer, Read)]
        found = np.array([int(a.probability[0].argmax()) == t.right for t, a in known], np.float64)
        items = Items(found, np.array([t.excerpts[0].document for t, _ in known], np.int64))
        n, documents = len(known), len(np.unique(items.document))
        values = items.weights @ found / np.maximum(items.weights.sum(1), 1) if n else [np.nan]
        failed = len(here) - n
        chance = Score(1 / LISTED)
        for subject, score in (
            ("latent", score_of(np.asarray(values))),
            (CONSTANT, chance),
        ):
            yield Scored(
                subject, INTRUDER, part, "accuracy", score, n, int(found.sum()), documents, failed
            )
