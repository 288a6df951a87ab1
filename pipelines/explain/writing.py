"""Explanations written by a language model from the evidence of a latent."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

import numpy as np

from sae_harvest.pipelines.explain.client.interface import Generation, Text
from sae_harvest.pipelines.explain.config import ExplainConfig
from sae_harvest.pipelines.explain.excerpts import Evidence, Excerpt
from sae_harvest.pipelines.explain.programs import LatentProgram
from sae_harvest.pipelines.explain.prompts import Prompt
from sae_harvest.pipelines.explain.rendering import (
    active,
    levels,
    lines,
    marked,
    numbered,
    one_line,
    quoted,
)
from sae_harvest.pipelines.explain.tasks import SPREAD, TOP

MAX_TOKENS = 60  # of an explanation
MAX_CHARACTERS = 300
TEMPERATURE = 0.8  # of all candidates but the first
LISTED_TOKENS = 10  # tokens of a list in the prompt
PROGRAM_ORDER = ("n2g_exceptions", "n2g", "ngrams", "tokens")


def shown(evidence: Evidence, config: ExplainConfig) -> tuple[list[Excerpt], list[Excerpt]]:
    """Choose the excerpts that the explainer sees: active ones, and silent ones."""
    top = evidence.of("train", TOP, config.shown - config.shown // 2)
    spread = evidence.of("train", SPREAD, config.shown - len(top))
    silent = evidence.of("train", ["hard_negative", "inactive"], config.contrast)
    return [*top, *spread], silent


def requests(
    prompt: Prompt,
    evidence: Evidence,
    programs: Sequence[LatentProgram],
    config: ExplainConfig,
) -> list[Generation]:
    """Ask for candidates of an explanation. The first is the most likely one, others are drawn.

    Args:
        prompt: the prompt `explain`.
        evidence: the latent; only excerpts of the set `train` are shown.
        programs: its programs.
        config: numbers of excerpts and candidates, seed of the draws.
    """
    messages = prompt.messages(values_of(evidence, programs, config))
    return [
        Generation(messages, MAX_TOKENS, TEMPERATURE if number else 0.0, config.seed + number)
        for number in range(config.candidates)
    ]


def values_of(
    evidence: Evidence, programs: Sequence[LatentProgram], config: ExplainConfig
) -> dict[str, str]:
    """Return what may stand in the places of the prompt `explain`."""
    firing, silent = shown(evidence, config)
    facts = evidence.facts
    tables = [
        lines(e.texts, map(str, levels(e.activations, evidence.largest).tolist())) for e in firing
    ]
    ranked = sorted(programs, key=lambda program: PROGRAM_ORDER.index(program.kind))
    return {
        "marked": numbered(map(marked, firing)),
        "numbers": "\n\n".join(tables),
        "silent": numbered(one_line(excerpt.text) for excerpt in silent),
        "top_tokens": quoted(active_tokens(evidence)),
        "promoted_tokens": quoted((facts["top_logit_tokens"] or [])[:LISTED_TOKENS]),
        "program": ranked[0].text if ranked else "(none)",
    }


def active_tokens(evidence: Evidence) -> list[str]:
    """Return the tokens that are most often active in the excerpts of the set `train`.

    The lists of the tables count all documents, those of the test as well.
    """
    counts = Counter[str]()
    for excerpt in evidence.excerpts["train"]:
        counts.update(np.array(excerpt.texts, object)[active(excerpt)].tolist())
    return [text for text, _ in counts.most_common(LISTED_TOKENS)]


def explanation_in(answer: Text) -> str | None:
    """Return the explanation in an answer: its first line, without what is around it.

    None if there is none.
    """
    for line in answer.text.splitlines():
        text = re.sub(r"^[\W_]*(explanation|answer)\s*:\s*", "", line.strip(), flags=re.IGNORECASE)
        text = text.strip().strip("\"'*`").strip().removesuffix(".").strip()
        if text:
            return text[:MAX_CHARACTERS]
    return None
