"""Rows of the tables of explanations."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import xxhash

from sae_harvest.pipelines.explain.client.interface import Failure, Generation, Read, Text
from sae_harvest.pipelines.explain.excerpts import Evidence
from sae_harvest.pipelines.explain.prompts import Prompt
from sae_harvest.pipelines.explain.rendering import unit_of
from sae_harvest.pipelines.explain.testing import PROMPT_OF, Tested


@dataclass(frozen=True, eq=False)
class Candidate:
    """An explanation that was written, or the failure to write one."""

    number: int
    """Number of the request, from 0."""

    request: Generation
    """The request."""

    answer: Text | Failure
    """The answer."""

    text: str | None
    """The explanation; None if the answer has none."""

    validation: float | None = None
    """Correlation of its simulation on the set `validation`; None if it was not simulated."""

    parent: str | None = None
    """Identity of the explanation that it was revised from."""

    @property
    def failure(self) -> str | None:
        """Reason for which there is no explanation."""
        if isinstance(self.answer, Failure):
            return self.answer.reason
        return None if self.text else "no explanation in the answer"


def identity(sae_digest: str, latent: int, text: str) -> str:
    """Return the identity of an explanation: of its SAE, its latent and its text."""
    return xxhash.xxh3_64_hexdigest(f"{sae_digest}\n{latent}\n{text}".encode())


def explanation_rows(
    sae_digest: str,
    evidence: Evidence,
    candidates: Sequence[Candidate],
    chosen: Candidate | None,
    useful: bool | None,
    model: str,
    prompts: Mapping[str, Prompt],
    shown: Sequence[int],
) -> Iterator[dict[str, Any]]:
    """Yield a row for each candidate, the chosen one first.

    Args:
        shown: rows of the excerpts that the explainer saw.
    """
    for candidate in sorted(candidates, key=lambda one: (one is not chosen, one.number)):
        usage = candidate.answer.usage if isinstance(candidate.answer, Text) else None
        yield {
            "latent": evidence.latent,
            "explanation": candidate.text,
            "id": candidate.text and identity(sae_digest, evidence.latent, candidate.text),
            "chosen": candidate is chosen,
            "candidate": candidate.number,
            "parent": candidate.parent,
            "validation": candidate.validation,
            "useful": useful if candidate is chosen else None,
            "failure": candidate.failure,
            "model": model,
            "prompt": prompts["explain" if candidate.parent is None else "revise"].digest,
            "temperature": candidate.request.temperature,
            "seed": candidate.request.seed,
            "rows": list(shown),
            "prompt_tokens": usage and usage.prompt_tokens,
            "new_tokens": usage and usage.new_tokens,
        }


def score_rows(
    latent: int, explanation: str, tested: Tested, model: str, prompts: Mapping[str, Prompt]
) -> Iterator[dict[str, Any]]:
    """Yield a row for each score; `explanation` is the identity of the explanation."""
    for one in tested.scores:
        yield {
            "latent": latent,
            "id": explanation,
            "subject": one.subject,
            "task": one.task,
            "part": one.part,
            "metric": one.metric,
            "value": one.score.value,
            "low": one.score.low,
            "high": one.score.high,
            "items": one.items,
            "true_items": one.true_items,
            "documents": one.documents,
            "failed": one.failed,
            "model": model,
            "prompt": prompts[PROMPT_OF[one.task]].digest,
        }


def simulation_rows(
    evidence: Evidence, tested: Tested, ids: Mapping[str, str]
) -> Iterator[dict[str, Any]]:
    """Yield a row for each simulated excerpt; `ids` has the explanation of each subject."""
    unit = unit_of(evidence.largest)
    for asked in tested.asked:
        levels = iter(asked.simulated.levels)
        pairs = zip(asked.questions.simulated, asked.simulation, strict=True)
        for excerpt, answer in pairs:
            known = isinstance(answer, Read)
            yield {
                "latent": evidence.latent,
                "id": ids[asked.questions.subject],
                "stratum": excerpt.stratum,
                "row": excerpt.row,
                "first_row": excerpt.first_row,
                "document": excerpt.document,
                "tokens": list(excerpt.texts),
                "activations": excerpt.activations.tolist(),
                "simulated": (unit * next(levels)).tolist() if known else None,
                "failure": answer.reason if isinstance(answer, Failure) else None,
            }


def question_rows(latent: int, tested: Tested, ids: Mapping[str, str]) -> Iterator[dict[str, Any]]:
    """Yield a row for each question but those of simulations."""
    for asked in tested.asked:
        for task, trials in asked.questions.trials.items():
            for trial, answer in zip(trials, asked.trials[task], strict=True):
                read = answer.probability[0].tolist() if isinstance(answer, Read) else None
                yield {
                    "latent": latent,
                    "id": ids.get(asked.questions.subject),
                    "subject": asked.questions.subject,
                    "task": task,
                    "part": trial.kind,
                    "rows": [excerpt.row for excerpt in trial.excerpts],
                    "right": trial.right,
                    "probabilities": read,
                    "failure": answer.reason if isinstance(answer, Failure) else None,
                }
