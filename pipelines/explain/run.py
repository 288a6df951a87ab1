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

from sae_harvest.pipelines.explain import writing
from sae_harvest.pipelines.explain.client.interface import Client, Text
from sae_harvest.pipelines.explain.config import ExplainConfig
from sae_harvest.pipelines.explain.excerpts import Evidence, EvidenceSource
from sae_harvest.pipelines.explain.programs import LatentProgram, programs_of
from sae_harvest.pipelines.explain.prompts import Prompt
from sae_harvest.pipelines.explain.rows import (
    Candidate,
    explanation_rows,
    identity,
    question_rows,
    score_rows,
    simulation_rows,
)
from sae_harvest.pipelines.explain.scoring import EXPLANATION, OTHER
from sae_harvest.pipelines.explain.tables import SCHEMAS, write_tables
from sae_harvest.pipelines.explain.tasks import Sample, Sizes, simulations
from sae_harvest.pipelines.explain.testing import (
    Questions,
    ask,
    correlation,
    intruder_questions,
    questions_of,
    scored,
)
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

    @property
    def text(self) -> str:
        """The chosen explanation; only where one is chosen."""
        text = None if self.chosen is None else self.chosen.text
        if text is None:
            raise ValueError(f"latent {self.evidence.latent} has no explanation")
        return text


@dataclass(eq=False)
class Summary:
    """What a run has done."""

    explained: int = 0
    """Latents with an explanation."""

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

    Raises:
        RunError: tables or store are missing or damaged.
        InputError: the tables are of a cache of delphi, or the client cannot be used.
    """
    source = EvidenceSource(features, config.excerpt_tokens, moved)
    run = _Run(source, client, config, prompts, progress)
    rows: Rows = {name: [] for name in SCHEMAS}
    wanted = sorted(set(latents))
    for first in range(0, len(wanted), GROUP):
        group = wanted[first : first + GROUP]
        run.group(group, rows, f"latents {first + 1} to {first + len(group)} of {len(wanted)}")
    write_tables(features, wanted, rows)
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
    ) -> None:
        self._source, self._client = source, client
        self._config, self._prompts, self._progress = config, prompts, progress
        self._sizes = Sizes(config.shown, config.contrast, config.scored)
        self._digest: str = source.run["sae_digest"]
        self.summary = Summary()

    def group(self, latents: Sequence[int], rows: Rows, name: str) -> None:
        """Explain and score some latents; add their rows."""
        programs = programs_of(self._source.features, latents)
        found = []
        for evidence in self._source.of(latents):
            if writing.shown(evidence, self._sizes)[0]:
                found.append(Explained(evidence, programs[evidence.latent], []))
            else:
                self.summary.silent.append(evidence.latent)
        self._write(found, name)
        self._choose(found, name)
        self._test(found, rows, name)

    def _write(self, found: Sequence[Explained], name: str) -> None:
        """Ask for the candidates of each latent."""
        config = self._config
        requests = [
            writing.requests(
                self._prompts["explain"],
                one.evidence,
                one.programs,
                self._sizes,
                config.candidates,
                config.seed,
            )
            for one in found
        ]
        progress = self._stage(f"{name}: explaining")
        answers = iter(self._client.generate([r for some in requests for r in some], progress))
        for one, some in zip(found, requests, strict=True):
            for number, request in enumerate(some):
                answer = next(answers)
                text = writing.explanation_in(answer) if isinstance(answer, Text) else None
                one.candidates.append(Candidate(number, request, answer, text))

    def _choose(self, found: Sequence[Explained], name: str) -> None:
        """Simulate different candidates on the set `validation`, and choose the best."""
        asked: list[tuple[Explained, str, Questions]] = []
        for one in found:
            texts = list(dict.fromkeys(c.text for c in one.candidates if c.text))
            sample = Sample.of(one.evidence, "validation", self._config.scored)
            excerpts = sample.every
            if len(texts) > 1 and sample.active:
                for text in texts:
                    readings = simulations(self._prompts["simulate"], text, excerpts)
                    asked.append((one, text, Questions(EXPLANATION, excerpts, readings, {})))
        progress = self._stage(f"{name}: choosing")
        answers = ask(self._client, [questions for _, _, questions in asked], progress)
        for (one, text, _), answer in zip(asked, answers, strict=True):
            value = correlation(answer.simulated)
            one.candidates = [
                replace(c, validation=value) if c.text == text else c for c in one.candidates
            ]
        for one in found:
            written = [c for c in one.candidates if c.text]
            if not written:
                self.summary.failed.append(one.evidence.latent)
                continue
            lowest = float("-inf")
            one.chosen = max(
                written, key=lambda c: lowest if c.validation is None else c.validation
            )

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
            latent = one.evidence.latent
            useful[latent] = result.useful
            self.summary.explained += 1
            self.summary.useful += result.useful is True
            rows["scores"] += score_rows(latent, ids[EXPLANATION], result, model, self._prompts)
            rows["simulations"] += simulation_rows(one.evidence, result, ids)
            rows["questions"] += question_rows(latent, result, ids)
        for one in found:
            shown = [e.row for some in writing.shown(one.evidence, self._sizes) for e in some]
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

    def _id(self, one: Explained) -> str:
        return identity(self._digest, one.evidence.latent, one.text)

    def _stage(self, name: str) -> Callable[[int, int], None]:
        return lambda done, total: self._progress(name, done, total)
