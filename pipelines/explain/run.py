"""Explanations of latents, chosen and scored: a few latents at a time.

For each latent, candidates are written from the set `train`; the one whose simulation has the
largest correlation on `validation` is chosen, and scored on `test`. All answers of the language
model are in a cache, so the same call continues where an earlier one was stopped.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from sae_harvest.pipelines.explain import revising, writing
from sae_harvest.pipelines.explain.asking import counted
from sae_harvest.pipelines.explain.client.interface import Client, Failure, Generation, Text
from sae_harvest.pipelines.explain.config import ExplainConfig
from sae_harvest.pipelines.explain.excerpts import Evidence, EvidenceSource
from sae_harvest.pipelines.explain.programs import LatentProgram, programs_of
from sae_harvest.pipelines.explain.prompts import Prompt
from sae_harvest.pipelines.explain.revising import Reads
from sae_harvest.pipelines.explain.rows import (
    Candidate,
    explanation_rows,
    identity,
    question_rows,
    score_rows,
    simulation_rows,
)
from sae_harvest.pipelines.explain.scoring import BEFORE, EXPLANATION, OTHER
from sae_harvest.pipelines.explain.tables import SCHEMAS, write_tables
from sae_harvest.pipelines.explain.tasks import Sample, simulations
from sae_harvest.pipelines.explain.testing import (
    Questions,
    ask,
    correlation,
    intruder_questions,
    questions_of,
    scored,
)
from sae_harvest.pipelines.features.reading.labels import write_labels
from sae_harvest.pipelines.source import NOTHING_MOVED, Locations

GROUP = 16  # latents whose requests are asked together
Progress = Callable[[str, int, int], None]  # stage, amount done, amount in all
Rows = dict[str, list[dict[str, Any]]]


@dataclass(eq=False)
class Explained:
    """The explanation of one latent."""

    evidence: Evidence
    """Its excerpts."""

    programs: Sequence[LatentProgram]
    """Its programs."""

    candidates: list[Candidate]
    """All that was written."""

    chosen: Candidate | None = None
    """The candidate that is scored; None if nothing was written."""

    first: Candidate | None = None
    """The candidate that was chosen before revisions, if another one is chosen now."""

    @property
    def text(self) -> str:
        """The chosen explanation; only where one is chosen."""
        text = None if self.chosen is None else self.chosen.text
        if text is None:
            raise ValueError(f"latent {self.evidence.latent} has no explanation")
        return text


@dataclass(eq=False)
class Summary:
    """The result of a run."""

    explained: int = 0
    """Latents with an explanation."""

    revised: int = 0
    """Latents whose explanation was replaced by a revised one."""

    silent: list[int] = field(default_factory=list)
    """Latents without an active excerpt for the explainer: nothing is asked about them."""

    failed: list[int] = field(default_factory=list)
    """Latents for which no candidate was written."""

    useful: int = 0
    """Latents whose explanation beats every program by more than the interval."""

    scores: list[dict[str, Any]] = field(default_factory=list)
    """Rows of the table of scores."""


def explain(
    features: Path,
    client: Client,
    latents: Sequence[int],
    config: ExplainConfig,
    prompts: Mapping[str, Prompt],
    moved: Locations = NOTHING_MOVED,
    progress: Progress = lambda stage, done, total: None,
    reader: Reads | None = None,
    write: bool = True,
) -> Summary:
    """Explain latents, and write or replace their rows in the tables of explanations.

    Args:
        features: folder of the tables.
        client: the language model, with its cache.
        latents: the latents.
        config: sizes and seed.
        prompts: prompts by name; see `load_prompts`.
        moved: new place of the store, if it has moved.
        progress: called with a stage, the amount done, the amount in all.
        reader: the model with its SAE, which reads proposed texts; needed for revisions.
        write: whether to write the tables.

    Raises:
        RunError: tables or store are missing or damaged.
        InputError: the tables are of a cache of delphi, or the client cannot be used.
    """
    source = EvidenceSource(features, config.excerpt_tokens, moved)
    run = _Run(source, client, config, prompts, progress, reader)
    rows: Rows = {name: [] for name in SCHEMAS}
    wanted = sorted(set(latents))
    for first in range(0, len(wanted), GROUP):
        group = wanted[first : first + GROUP]
        run.group(group, rows, f"latents {first + 1} to {first + len(group)} of {len(wanted)}")
    if write:
        write_tables(features, wanted, rows)
        write_labels(features)
    run.summary.scores = rows["scores"]
    return run.summary


class _Run:
    """The parts of one call of `explain`."""

    def __init__(
        self,
        source: EvidenceSource,
        client: Client,
        config: ExplainConfig,
        prompts: Mapping[str, Prompt],
        progress: Progress,
        reader: Reads | None,
    ) -> None:
        self._source, self._client, self._reader = source, client, reader
        self._config, self._prompts, self._progress = config, prompts, progress
        self._digest: str = source.run["sae_digest"]
        self.summary = Summary()

    def group(self, latents: Sequence[int], rows: Rows, name: str) -> None:
        """Explain and score some latents; add their rows."""
        programs = programs_of(self._source.features, latents)
        found = []
        for evidence in self._source.of(latents):
            if writing.shown(evidence, self._config)[0]:
                found.append(Explained(evidence, programs[evidence.latent], []))
            else:
                self.summary.silent.append(evidence.latent)
        self._write(found, name)
        self._choose(found, name)
        for number in range(self._config.revisions):
            self._revise(found, number, f"{name}, revision {number + 1}")
        self._test(found, rows, name)

    def _write(self, found: Sequence[Explained], name: str) -> None:
        """Ask for the candidates of each latent."""
        prompt = self._prompts["explain"]
        requests = [
            writing.requests(prompt, one.evidence, one.programs, self._config) for one in found
        ]
        every = [request for some in requests for request in some]
        answers = iter(self._generate(every, f"{name}: explaining"))
        for one, some in zip(found, requests, strict=True):
            for number, request in enumerate(some):
                answer = next(answers)
                text = writing.explanation_in(answer) if isinstance(answer, Text) else None
                one.candidates.append(Candidate(number, request, answer, text))

    def _choose(self, found: Sequence[Explained], name: str) -> None:
        """Simulate different candidates on the set `validation`, and choose the best."""
        several = {
            one.evidence.latent: texts
            for one in found
            if len(texts := list(dict.fromkeys(c.text for c in one.candidates if c.text))) > 1
        }
        self._validate(found, several, name)
        for one in found:
            one.chosen = _best(one.candidates)
            if one.chosen is None:
                self.summary.failed.append(one.evidence.latent)

    def _validate(
        self, found: Sequence[Explained], texts: Mapping[int, Sequence[str]], name: str
    ) -> None:
        """Simulate explanations of some latents on the set `validation`; note the correlations.

        A latent without an active excerpt there stays without.
        """
        asked: list[tuple[Explained, str, Questions]] = []
        for one in found:
            sample = Sample.of(one.evidence, "validation", self._config.scored)
            for text in texts.get(one.evidence.latent, ()) if sample.active else ():
                readings = simulations(self._prompts["simulate"], text, sample.every)
                asked.append((one, text, Questions(EXPLANATION, sample.every, readings, {})))
        progress = self._stage(f"{name}: choosing")
        answers = ask(self._client, [questions for _, _, questions in asked], progress)
        for (one, text, _), answer in zip(asked, answers, strict=True):
            value = correlation(answer.simulated)
            one.candidates = [
                replace(c, validation=value) if c.text == text else c for c in one.candidates
            ]

    def _revise(self, found: Sequence[Explained], number: int, name: str) -> None:
        """Revise explanations by texts that the explainer proposes."""
        if self._reader is None:
            raise ValueError("revisions need a reader")
        written = [one for one in found if one.chosen is not None]
        seed = self._config.seed + number
        asked = [revising.proposal(self._prompts["propose"], one.text, seed) for one in written]
        answers = self._generate(asked, f"{name}: proposing")
        pairs = []
        for one, answer in zip(written, answers, strict=True):
            texts = revising.proposed(answer) if isinstance(answer, Text) else []
            seen = revising.tried(self._reader, one.evidence.latent, texts)
            if seen:
                largest = one.evidence.largest
                prompt = self._prompts["revise"]
                pairs.append((one, revising.revision(prompt, one.text, seen, largest, seed)))
        requests = [request for _, request in pairs]
        revised = self._generate(requests, f"{name}: revising")
        several: dict[int, list[str]] = {}
        for (one, request), answer in zip(pairs, revised, strict=True):
            text = writing.explanation_in(answer) if isinstance(answer, Text) else None
            parent = self._id(one)
            one.candidates.append(
                Candidate(len(one.candidates), request, answer, text, parent=parent)
            )
            if text is not None and text != one.text:
                several[one.evidence.latent] = [one.text, text]
        self._validate(found, several, name)
        for one in written:
            best, before = _best(one.candidates), one.chosen
            assert best is not None
            assert before is not None
            if best.text != before.text:
                one.first = one.first or before
            one.chosen = best  # also where it is the same with a correlation

    def _test(self, found: Sequence[Explained], rows: Rows, name: str) -> None:
        """Score the chosen explanations on the set `test`; add the rows of all latents."""
        tested = [one for one in found if one.chosen is not None]
        others = [*tested[1:], *tested[:1]]
        samples, plans = [], []
        for one, other in zip(tested, others, strict=True):
            sample = Sample.of(one.evidence, "test", self._config.scored)
            plan = [questions_of(self._prompts, sample, one.text, EXPLANATION)]
            if other is not one:
                plan.append(questions_of(self._prompts, sample, other.text, OTHER))
            if one.first is not None and one.first.text is not None:
                plan.append(questions_of(self._prompts, sample, one.first.text, BEFORE))
                self.summary.revised += 1
            plans.append([*plan, intruder_questions(self._prompts, sample)])
            samples.append(sample)
        progress = self._stage(f"{name}: scoring")
        answers = iter(ask(self._client, [q for plan in plans for q in plan], progress))
        model, seed = self._client.identity, self._config.seed
        useful: dict[int, bool | None] = {}
        for one, other, sample, plan in zip(tested, others, samples, plans, strict=True):
            asked = [next(answers) for _ in plan]
            result = scored(one.evidence, one.programs, sample, asked, seed)
            ids = {EXPLANATION: self._id(one), OTHER: self._id(other)}
            if one.first is not None and one.first.text is not None:
                ids[BEFORE] = identity(self._digest, one.evidence.latent, one.first.text)
            latent = one.evidence.latent
            useful[latent] = result.useful
            self.summary.explained += 1
            self.summary.useful += result.useful is True
            rows["scores"] += score_rows(latent, ids[EXPLANATION], result, model, self._prompts)
            rows["simulations"] += simulation_rows(one.evidence, result, ids)
            rows["questions"] += question_rows(latent, result, ids)
        for one in found:
            shown = [e.row for some in writing.shown(one.evidence, self._config) for e in some]
            rows["explanations"] += explanation_rows(
                self._digest,
                one.evidence,
                one.candidates,
                one.chosen,
                useful.get(one.evidence.latent),
                model,
                self._prompts,
                shown,
            )

    def _generate(self, requests: Sequence[Generation], stage: str) -> list[Text | Failure]:
        return self._client.generate(requests, counted(self._stage(stage), len(requests)))

    def _id(self, one: Explained) -> str:
        return identity(self._digest, one.evidence.latent, one.text)

    def _stage(self, name: str) -> Callable[[int, int], None]:
        return lambda done, total: self._progress(name, done, total)


def _best(candidates: Sequence[Candidate]) -> Candidate | None:
    """Return the first of the candidates with the largest correlation; None without any."""
    written = [candidate for candidate in candidates if candidate.text]
    lowest = float("-inf")
    return max(
        written, key=lambda c: lowest if c.validation is None else c.validation, default=None
    )
