"""Tasks on which an explanation is scored, as requests to a language model.

simulation   how active the latent is on each token of an excerpt, from 0 to 9
detection    whether an excerpt has what the explanation says
fuzzing      whether the marked tokens are what the explanation says
intruder     which of five excerpts does not belong to the others; needs no explanation

Silent excerpts are of three kinds: `random`; `token`, with a token on which the latent often fires;
`neighbour`, on which a similar latent fires. In fuzzing, active excerpts with wrong tokens marked
are a fourth.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from sae_harvest.pipelines.explain.client.interface import Read, Reading
from sae_harvest.pipelines.explain.excerpts import Evidence, Excerpt, Part
from sae_harvest.pipelines.explain.prompts import Prompt
from sae_harvest.pipelines.explain.rendering import (
    LEVELS,
    UNKNOWN,
    active,
    lines,
    marked,
    numbered,
    one_line,
    slots,
)
from sae_harvest.pipelines.features.reading.labels import ALL_FIRINGS

DETECTION, FUZZING, INTRUDER = "detection", "fuzzing", "intruder"
ACTIVE, RANDOM, TOKEN, NEIGHBOUR = "active", "random", "token", "neighbour"
WRONG_TOKENS = "wrong tokens"
YES, NO = "Yes", "No"
DIGITS = tuple(str(level) for level in range(LEVELS))
LISTED = 5  # excerpts of an intruder list
TOP = ("top",)
SPREAD = (*(f"decile_{n}" for n in range(10, 0, -1)), "random")
TOP_FIRINGS = "top firings"  # of a simulation, beside ALL_FIRINGS
Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class Sample:
    """The excerpts of one set of documents that a latent is scored on."""

    top: Sequence[Excerpt]
    """The highest activations."""

    spread: Sequence[Excerpt]
    """Firings drawn from all tenths of the distribution."""

    silent: Mapping[str, Sequence[Excerpt]]
    """Silent excerpts by kind."""

    @classmethod
    def of(cls, evidence: Evidence, part: Part, most: int) -> Sample:
        """Choose excerpts of one set."""
        hard = evidence.of(part, ["hard_negative"])
        top = evidence.of(part, TOP, most)
        spread = evidence.of(part, SPREAD, most)
        silent = {
            RANDOM: evidence.of(part, ["inactive"], most),
            TOKEN: [e for e in hard if e.reason == TOKEN][:most],
            NEIGHBOUR: [e for e in hard if e.reason == NEIGHBOUR][:most],
        }
        return cls(top, spread, silent)

    @property
    def active(self) -> list[Excerpt]:
        """Both kinds of active excerpts."""
        return [*self.top, *self.spread]

    @property
    def simulated(self) -> dict[str, list[Excerpt]]:
        """Excerpts by group of a simulation: active ones, and random silent ones."""
        quiet = list(self.silent[RANDOM])
        return {TOP_FIRINGS: [*self.top, *quiet], ALL_FIRINGS: [*self.spread, *quiet]}

    @property
    def every(self) -> list[Excerpt]:
        """All excerpts."""
        return [*self.active, *(e for some in self.silent.values() for e in some)]


@dataclass(frozen=True, eq=False)
class Trial:
    """A question with the right answer."""

    reading: Reading
    """The question."""

    kind: str
    """ACTIVE, or the kind of distractor."""

    right: int
    """Number of the right choice."""

    excerpts: tuple[Excerpt, ...]
    """Excerpts that the question shows; the one that decides is the first."""

    which: Bools
    """The tokens of that one which the question is about."""


def simulations(prompt: Prompt, explanation: str, excerpts: Sequence[Excerpt]) -> list[Reading]:
    """Ask for the activation on every token of excerpts."""
    prefix = prompt.prefix({"explanation": explanation})
    return [_simulation(prompt, prefix, excerpt) for excerpt in excerpts]


def _simulation(prompt: Prompt, prefix: str, excerpt: Excerpt) -> Reading:
    tokens = lines(excerpt.texts, [UNKNOWN] * len(excerpt.texts))
    text = prompt.text({"tokens": tokens})
    begin = text.index(tokens)
    places = tuple(begin + place for place in slots(excerpt.texts))
    return Reading(prefix, text, places, DIGITS)


def expected(read: Read) -> Floats:
    """Return the expected level on each token, from 0 to 9, float64 [tokens]."""
    return read.probability @ np.arange(LEVELS)


def detections(prompt: Prompt, explanation: str, sample: Sample) -> list[Trial]:
    """Ask whether excerpts have what an explanation says."""
    shared = {"explanation": explanation}

    def trial(excerpt: Excerpt, kind: str) -> Trial:
        values = {"text": one_line(excerpt.text)}
        reading = prompt.at_the_end(shared, values, (YES, NO))
        return Trial(
            reading, kind, int(kind != ACTIVE), (excerpt,), np.ones(len(excerpt.ids), bool)
        )

    trials = [trial(excerpt, ACTIVE) for excerpt in sample.active]
    return trials + [trial(e, kind) for kind, some in sample.silent.items() for e in some]


def fuzzings(prompt: Prompt, explanation: str, sample: Sample) -> list[Trial]:
    """Ask whether the marked tokens of excerpts are what an explanation says."""
    shared = {"explanation": explanation}

    def trial(excerpt: Excerpt, which: Bools, kind: str) -> Trial:
        values = {"marked": marked(excerpt, which)}
        reading = prompt.at_the_end(shared, values, (YES, NO))
        return Trial(reading, kind, int(kind != ACTIVE), (excerpt,), which)

    found = [trial(excerpt, active(excerpt), ACTIVE) for excerpt in sample.active]
    found += [
        trial(excerpt, which, WRONG_TOKENS)
        for excerpt in sample.active
        if (which := wrong_tokens(excerpt)).any()
    ]
    return found + [
        trial(excerpt, like_active(excerpt, sample.active), kind)
        for kind, some in sample.silent.items()
        for excerpt in some
    ]


def wrong_tokens(excerpt: Excerpt) -> Bools:
    """Choose as many tokens as are active, among those on which the latent is silent."""
    silent = np.flatnonzero(excerpt.activations <= 0)
    n = min(int(active(excerpt).sum()), len(silent))
    return _drawn(excerpt, silent, n)


def like_active(excerpt: Excerpt, others: Sequence[Excerpt]) -> Bools:
    """Choose tokens of a silent excerpt: its own row, and others, as many as are usually active."""
    counts = [int(active(other).sum()) for other in others]
    n = max(1, round(float(np.mean(counts)))) if counts else 1
    chosen = _drawn(excerpt, np.setdiff1d(np.arange(len(excerpt.ids)), [excerpt.focus]), n - 1)
    chosen[excerpt.focus] = True
    return chosen


def _drawn(excerpt: Excerpt, among: npt.NDArray[np.int64], n: int) -> Bools:
    """Draw places; the draw depends on the row only."""
    drawn = np.random.default_rng(excerpt.row).permutation(among)[:n]
    chosen = np.zeros(len(excerpt.ids), np.bool_)
    chosen[drawn] = True
    return chosen


def intruders(prompt: Prompt, sample: Sample) -> list[Trial]:
    """Ask which of five excerpts does not belong to the others, a list for each silent excerpt."""
    found = list[Trial]()
    others = sample.active
    if len(others) < LISTED - 1:
        return found
    for kind, some in sample.silent.items():
        for excerpt in some:
            rng = np.random.default_rng(excerpt.row)
            chosen = [others[n] for n in rng.permutation(len(others))[: LISTED - 1]]
            place = int(rng.integers(LISTED))
            texts = [marked(other) for other in chosen]
            which = like_active(excerpt, chosen)
            texts.insert(place, marked(excerpt, which))
            reading = prompt.at_the_end({}, {"list": numbered(texts)}, DIGITS[1 : LISTED + 1])
            found.append(Trial(reading, kind, place, (excerpt, *chosen), which))
    return found
