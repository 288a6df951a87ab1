"""Neuron to Graph (N2G): patterns of tokens, found by asking the model.

Foote et al. (2023), as used by Gao et al. (2024, section 4.3). For each example, a context in
which the latent fires on the last token with activation a:

1. The shortest suffix on whose last token the latent reaches a / 2 is kept.
2. With a padding token before it, the suffix has to reach a / 2 as well; otherwise the pattern
   matches at the start of a context only.
3. Each token is replaced by the padding token. With m the activation then, its importance is
   1 - m / b, b being the activation on the suffix. A token with less than 0.5 becomes a wildcard.

The patterns form a trie, read from the row backwards, with b at its ends (the mean over examples
with the same pattern). Wildcards at the front are left out, unless the pattern begins at the start
of a context. If several patterns match a row, the one with the most tokens decides; then the
longer one; then the one with the higher prediction.

Such a program has no exceptions: it is built of firings only. `with_exceptions` adds them, which
is not part of N2G as published. For training rows that a pattern with prediction v matches, and
on which the activation is below v / 2:

1. The shortest suffix with less than v / 2 is kept, if it has at most 8 tokens.
2. The tokens of the pattern stay, and each token whose replacement restores v / 2; the others
   become wildcards. If no token is added to the pattern's, there is no exception.

An example asks for little: a few inputs, then a few others that depend on the answers. Examples of
several latents are asked together.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from sae_harvest.pipelines.evaluate.programs.firings import SplitFirings
from sae_harvest.pipelines.evaluate.programs.forms import ANY
from sae_harvest.pipelines.evaluate.programs.suffixes import START, TokenRows

KEPT = 0.5  # share of the activation that a suffix has to reach, and least importance of a token
LONGEST = 32  # tokens of the longest suffix
TOP, RANDOM = 16, 16  # examples of a latent: highest activations, and drawn from all firings
COUNTEREXAMPLES, LONGEST_EXCEPTION = 16, 8  # of a latent; tokens of the longest suffix

Input = tuple[int, tuple[int, ...]]  # a latent and token ids
Ask = Callable[[Sequence[Input]], npt.NDArray[np.float64]]  # activations on the last tokens
Pattern = tuple[int, ...]  # farthest token first; may have ANY, and START in front
_Dialogue = Generator[
    list[tuple[int, ...]], npt.NDArray[np.float64], "tuple[Pattern, float] | None"
]


@dataclass(frozen=True)
class Example:
    """A context in which a latent fires."""

    latent: int
    """The latent."""
    tokens: tuple[int, ...]
    """Token ids of the context up to the row."""
    activation: float
    """Activation of the latent on the last of them."""


@dataclass(frozen=True)
class Program:
    """Patterns with the activations that they predict, in the order in which they decide."""

    patterns: tuple[Pattern, ...]
    """Patterns; of those that match a row, the first decides."""
    predictions: tuple[float, ...]
    """Predicted activations, above 0."""


def examples_of(rows: TokenRows, latent: int, firings: SplitFirings, seed: int) -> list[Example]:
    """Choose examples of a latent among its firings on training rows.

    The highest activations of 16 contexts, then 16 more firings, drawn uniformly.

    Args:
        firings: those of the latent only.
        seed: seed of the draw.
    """
    length = rows.context_length
    usable = firings.row % length >= rows.text_begins
    row, value = firings.row[usable], firings.value[usable]
    order = np.lexsort((row, -value))
    _, firsts = np.unique(row[order] // length, return_index=True)
    top = order[np.sort(firsts)[:TOP]]
    left = np.setdiff1d(np.arange(len(row)), top)
    drawn = np.random.default_rng((seed, latent)).permutation(left)[:RANDOM]
    found = []
    for place in np.concatenate([top, drawn]).tolist():
        end = int(row[place]) + 1
        start = (end - 1) // length * length + rows.text_begins
        tokens = tuple(rows.token[max(start, end - LONGEST) : end].tolist())
        found.append(Example(latent, tokens, float(value[place])))
    return found


@dataclass(frozen=True)
class Counterexample:
    """A context that a pattern matches although the latent fires little or not."""

    latent: int
    """The latent."""
    tokens: tuple[int, ...]
    """Token ids of the context up to the row."""
    pattern: Pattern
    """The pattern that decides on the row."""
    prediction: float
    """Activation that it predicts."""


def counterexamples_of(
    rows: TokenRows, latent: int, firings: SplitFirings, program: Program, seed: int
) -> list[Counterexample]:
    """Draw up to 16 training rows on which a program predicts more than twice the activation.

    Rows of patterns that match at the start of a context only, or have more than 8 tokens, are left
    out.

    Args:
        firings: those of the latent on training rows.
        seed: seed of the draw.
    """
    if not program.patterns:
        return []
    deciding = match(rows, program.patterns)
    activation = np.zeros(len(deciding), np.float32)
    activation[firings.row] = firings.value
    predicted = np.append(np.array(program.predictions), 0.0)[deciding]
    may_grow = [p[0] != START and len(p) <= LONGEST_EXCEPTION for p in program.patterns]
    usable = rows.train & np.append(may_grow, False)[deciding]
    wrong = np.flatnonzero(usable & (activation < KEPT * predicted))
    found = []
    for row in np.random.default_rng((seed, latent)).permutation(wrong)[:COUNTEREXAMPLES].tolist():
        start = row - row % rows.context_length + rows.text_begins
        tokens = tuple(rows.token[max(start, row + 1 - LONGEST) : row + 1].tolist())
        number = int(deciding[row])
        found.append(
            Counterexample(latent, tokens, program.patterns[number], program.predictions[number])
        )
    return found


def find(examples: Iterable[Example], ask: Ask, padding: int) -> dict[int, Program]:
    """Find the programs of the latents of examples, by latent.

    Args:
        examples: examples of one or several latents.
        ask: gives the activation of a latent on the last of some tokens.
        padding: token id that takes the place of others.
    """
    dialogues = [(example.latent, _dialogue(example, padding)) for example in examples]
    return {latent: _program(some) for latent, some in _answered(dialogues, ask).items()}


def with_exceptions(
    programs: dict[int, Program],
    counterexamples: Iterable[Counterexample],
    ask: Ask,
    padding: int,
) -> dict[int, Program]:
    """Add exceptions to programs, by latent; arguments as in `find`."""
    dialogues = [(one.latent, _exception(one, padding)) for one in counterexamples]
    found = _answered(dialogues, ask)
    return {
        latent: _program(
            [
                *zip(program.patterns, program.predictions, strict=True),
                *(one for one in found.get(latent, ()) if one[0] not in program.patterns),
            ]
        )
        for latent, program in programs.items()
    }


def _answered(
    dialogues: Sequence[tuple[int, _Dialogue]], ask: Ask
) -> dict[int, list[tuple[Pattern, float]]]:
    """Hold dialogues of several latents at the same time; return the patterns of each latent."""
    found: dict[int, list[tuple[Pattern, float]]] = {latent: [] for latent, _ in dialogues}
    going = [(latent, dialogue, next(dialogue)) for latent, dialogue in dialogues]
    while going:
        answers = ask([(latent, tokens) for latent, _, inputs in going for tokens in inputs])
        at, still = 0, []
        for latent, dialogue, inputs in going:
            try:
                more = dialogue.send(answers[at : at + len(inputs)])
                still.append((latent, dialogue, more))
            except StopIteration as end:
                if end.value is not None:
                    found[latent].append(end.value)
            at += len(inputs)
        going = still
    return found


def match(rows: TokenRows, patterns: Sequence[Pattern]) -> npt.NDArray[np.int32]:
    """Return the first of the patterns that matches each row, or -1: int32 [rows]."""
    found = np.full(len(rows.token), -1, np.int32)
    by_token = np.argsort(rows.token, kind="stable")
    tokens = rows.token[by_token]
    for number in range(len(patterns) - 1, -1, -1):
        found[_rows_of(rows, patterns[number], by_token, tokens)] = number
    return found


def _rows_of(
    rows: TokenRows,
    pattern: Pattern,
    by_token: npt.NDArray[np.int64],
    tokens: npt.NDArray[np.int32],
) -> npt.NDArray[np.int64]:
    """Return the rows that a pattern matches."""
    fixed = [(back, token) for back, token in enumerate(reversed(pattern)) if token >= 0]
    length = rows.context_length
    if fixed:
        back, token = fixed[0]
        here = by_token[slice(*np.searchsorted(tokens, [token, token + 1]))]
        some = here[here % length + back < length] + back
    else:
        some = np.arange(len(rows.token))
    place = some % length - rows.text_begins
    farthest = fixed[-1][0] if fixed else 0
    if pattern[0] == START:
        some = some[(place >= farthest) & (place < len(pattern) - 1)]
    else:
        some = some[place >= farthest]
    for back, token in fixed[1:]:
        some = some[rows.token[some - back] == token]
    return some


def _dialogue(example: Example, padding: int) -> _Dialogue:
    """Ask for inputs of an example until its pattern is known; None if no suffix suffices."""
    tokens, least = example.tokens, KEPT * example.activation
    for n in range(1, len(tokens) + 1):
        (reached,) = yield [tokens[-n:]]
        if reached >= least:
            break
    else:
        return None
    suffix = tokens[-n:]
    masked = [(*suffix[:i], padding, *suffix[i + 1 :]) for i in range(n)]
    padded, *without = yield [(padding, *suffix), *masked]
    pattern = tuple(
        token if 1 - activation / reached >= KEPT else ANY
        for token, activation in zip(suffix, without, strict=True)
    )
    if padded < least:
        return (START, *pattern), float(reached)
    return _trimmed(pattern), float(reached)


def _exception(example: Counterexample, padding: int) -> _Dialogue:
    """Ask for inputs of a counterexample until its exception is known; None if there is none."""
    tokens, least = example.tokens, KEPT * example.prediction
    for n in range(len(example.pattern), min(len(tokens), LONGEST_EXCEPTION) + 1):
        (reached,) = yield [tokens[-n:]]
        if reached < least:
            break
    else:
        return None
    suffix = tokens[-n:]
    own = (ANY,) * (n - len(example.pattern)) + example.pattern
    masked = [(*suffix[:i], padding, *suffix[i + 1 :]) for i in range(n)]
    padded, *without = yield [(padding, *suffix), *masked]
    pattern = tuple(
        token if fixed != ANY or activation >= least else ANY
        for token, fixed, activation in zip(suffix, own, without, strict=True)
    )
    if padded >= least:
        return (START, *pattern), float(reached)
    return None if pattern == own else (_trimmed(pattern), float(reached))


def _trimmed(pattern: Pattern) -> Pattern:
    """Leave out wildcards at the front; the last token stays."""
    front = 0
    while front < len(pattern) - 1 and pattern[front] == ANY:
        front += 1
    return pattern[front:]


def _program(found: Sequence[tuple[Pattern, float]]) -> Program:
    """Join the patterns of examples."""
    activations: dict[Pattern, list[float]] = {}
    for pattern, activation in found:
        activations.setdefault(pattern, []).append(activation)
    means = {pattern: float(np.mean(some)) for pattern, some in activations.items()}

    def rank(pattern: Pattern) -> tuple[int, int, float, Pattern]:
        return -sum(token != ANY for token in pattern), -len(pattern), -means[pattern], pattern

    ordered = sorted(means, key=rank)
    return Program(tuple(ordered), tuple(means[pattern] for pattern in ordered))
