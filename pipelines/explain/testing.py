"""The test of an explanation: all tasks on the set `test`, asked together for several latents."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from sae_harvest.pipelines.explain.asking import counted, read
from sae_harvest.pipelines.explain.client.interface import Client, Failure, Read, Reading
from sae_harvest.pipelines.explain.excerpts import Evidence, Excerpt
from sae_harvest.pipelines.explain.programs import LatentProgram
from sae_harvest.pipelines.explain.prompts import Prompt
from sae_harvest.pipelines.explain.scores import Floats
from sae_harvest.pipelines.explain.scoring import (
    BEFORE,
    EXPLANATION,
    OTHER,
    Scored,
    Simulated,
    intruder_scores,
    simulation_scores,
    token_items,
    trial_scores,
)
from sae_harvest.pipelines.explain.tasks import (
    DETECTION,
    FUZZING,
    INTRUDER,
    Sample,
    Trial,
    detections,
    fuzzings,
    intruders,
    simulations,
)
from sae_harvest.pipelines.features.reading.labels import ALL_FIRINGS, SIMULATION

Answers = Sequence[Read | Failure]
PROMPT_OF = {SIMULATION: "simulate", DETECTION: "detect", FUZZING: "fuzz", INTRUDER: "intruder"}


@dataclass(frozen=True, eq=False)
class Questions:
    """Questions about one explanation, or about a latent itself."""

    subject: str
    """EXPLANATION, OTHER; or `latent`, for questions that show no explanation."""

    simulated: Sequence[Excerpt]
    """Excerpts that are simulated."""

    simulation: Sequence[Reading]
    """A reading for each of them."""

    trials: Mapping[str, Sequence[Trial]]
    """Trials by task."""

    @property
    def readings(self) -> Iterator[Reading]:
        """All readings; those with the same prefix follow one another."""
        yield from self.simulation
        for trials in self.trials.values():
            yield from (trial.reading for trial in trials)


@dataclass(frozen=True, eq=False)
class Asked:
    """Questions with their answers."""

    questions: Questions
    """The questions."""

    simulated: Simulated
    """The simulated excerpts."""

    simulation: Answers
    """An answer for each simulated excerpt."""

    trials: Mapping[str, Answers]
    """Answers by task, one for each trial."""


@dataclass(frozen=True, eq=False)
class Tested:
    """The test of one latent's explanation."""

    asked: Sequence[Asked]
    """All that was asked."""

    scores: Sequence[Scored]
    """All scores."""

    useful: bool | None
    """True if the explanation beats every program by more than the interval; None if unknown."""


def questions_of(
    prompts: Mapping[str, Prompt], sample: Sample, explanation: str, subject: str
) -> Questions:
    """Return what is asked about an explanation."""
    groups = sample.simulated.values()
    excerpts = list({id(e): e for group in groups for e in group}.values())
    trials = {
        DETECTION: detections(prompts["detect"], explanation, sample),
        FUZZING: fuzzings(prompts["fuzz"], explanation, sample),
    }
    asked = simulations(prompts["simulate"], explanation, excerpts)
    return Questions(subject, excerpts, asked, trials)


def intruder_questions(prompts: Mapping[str, Prompt], sample: Sample) -> Questions:
    """Return the questions that need no explanation."""
    return Questions("latent", [], [], {INTRUDER: intruders(prompts["intruder"], sample)})


def ask(
    client: Client,
    several: Sequence[Questions],
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Asked]:
    """Ask all questions in one call; `progress` is called with answers and their number."""
    readings = [reading for one in several for reading in one.readings]
    answers = iter(read(client, readings, counted(progress, len(readings))))
    found = []
    for one in several:
        simulation = [next(answers) for _ in one.simulation]
        trials = {task: [next(answers) for _ in some] for task, some in one.trials.items()}
        simulated = Simulated.of(one.simulated, simulation)
        found.append(Asked(one, simulated, simulation, trials))
    return found


def scored(
    evidence: Evidence,
    programs: Sequence[LatentProgram],
    sample: Sample,
    asked: Sequence[Asked],
    seed: int,
) -> Tested:
    """Compute the scores of a latent's explanation and of its floors."""
    found: list[Scored] = []
    useful = None
    for one in asked:
        subject = one.questions.subject
        of_others = subject in (OTHER, BEFORE)  # floors are the same as those of the explanation
        scores = list(_scores(evidence, () if of_others else programs, sample, one, seed))
        if of_others:
            scores = [replace(s, subject=subject) for s in scores if s.subject == EXPLANATION]
        if subject == EXPLANATION:
            useful = _beats(one.simulated.chosen(sample.simulated[ALL_FIRINGS]), programs)
        found += scores
    return Tested(asked, found, useful)


def _scores(
    evidence: Evidence,
    programs: Sequence[LatentProgram],
    sample: Sample,
    asked: Asked,
    seed: int,
) -> Iterator[Scored]:
    if asked.questions.simulation:
        for part, excerpts in sample.simulated.items():
            chosen = asked.simulated.chosen(excerpts)
            yield from simulation_scores(part, chosen, evidence.largest, programs, seed)
    for task, trials in asked.questions.trials.items():
        answers = asked.trials[task]
        if task == INTRUDER:
            yield from intruder_scores(trials, answers)
        else:
            yield from trial_scores(task, trials, answers, programs, seed)


def correlation(simulated: Simulated) -> float | None:
    """Return the correlation of true and simulated activations over all tokens; None if unknown."""
    found = _correlations(simulated)
    return None if found is None or not np.isfinite(found[0]) else float(found[0])


def _correlations(simulated: Simulated) -> Floats | None:
    if not simulated.excerpts:
        return None
    return token_items(simulated.excerpts).pearson(np.concatenate(simulated.levels))


def _beats(simulated: Simulated, programs: Sequence[LatentProgram]) -> bool | None:
    """Return whether a simulation correlates more than every program does, for 97.5 % of draws.

    The same documents are drawn for both. None without a program, or without two documents.
    """
    own = _correlations(simulated)
    if own is None or len(own) == 1 or not programs or not np.isfinite(own[0]):
        return None
    items = token_items(simulated.excerpts)
    told = [np.concatenate([*map(program.predict, simulated.excerpts)]) for program in programs]
    best = np.max([items.pearson(one) for one in told], axis=0)
    difference = (own - best)[1:]
    return bool(np.nanquantile(difference, 0.025) > 0)
