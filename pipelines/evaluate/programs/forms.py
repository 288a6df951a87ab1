"""The two forms of a program in the table: lists of token ids, and a line of text.

A pattern is a list of token ids, the farthest token first, the token of the row last. ANY stands
for any token, START for the place before the first token of a context.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from sae_harvest.common.cache import use_numba_cache
from sae_harvest.pipelines.evaluate.programs.suffixes import BACK, START, Suffixes
from sae_harvest.pipelines.evaluate.programs.tries import (
    BACK_OF,
    CHILD,
    CHILDREN,
    PARENT,
    PATTERN,
    ROWS,
    Tries,
)

use_numba_cache()

from numba import njit  # noqa: E402

ANY = -2
PRINTED = 12  # most patterns of a program in its text
ANY_TEXT, START_TEXT = "*", "^"


@dataclass(frozen=True, eq=False)
class Patterns:
    """Patterns of the programs of some latents, and what they predict."""

    starts: npt.NDArray[np.int64]
    """Where each latent's patterns begin [latents + 1]."""
    ends: npt.NDArray[np.int64]
    """Where each pattern's tokens end [patterns + 1], the first one 0."""
    token: npt.NDArray[np.int32]
    """The tokens of all patterns [tokens]."""
    value: npt.NDArray[np.float32]
    """Predicted activations [patterns]."""


def patterns_of(suffixes: Suffixes, tries: Tries) -> Patterns:
    """Write the nodes of tries as patterns."""
    row = suffixes.example[tries.nodes[:, PATTERN]] - tries.nodes[:, BACK_OF]
    inside = suffixes.example[tries.nodes[:, PATTERN]] % suffixes.rows.context_length
    token = np.where(inside >= tries.nodes[:, BACK_OF], suffixes.rows.token[row], START)
    tokens = np.full((len(row), BACK + 1), ANY, np.int32)  # farthest first
    farthest = np.zeros(len(row), np.int64)
    _follow(tries.nodes, token, tokens, farthest)
    used = np.arange(BACK, -1, -1) <= farthest[:, None]
    ends = np.concatenate([[0], np.cumsum(farthest + 1)])
    return Patterns(tries.starts, ends, tokens[used], tries.value.astype(np.float32))


@njit(nogil=True, cache=True)
def _follow(
    nodes: npt.NDArray[np.int64],
    token: npt.NDArray[np.int32],
    tokens: npt.NDArray[np.int32],
    farthest: npt.NDArray[np.int64],
) -> None:
    """Write the tokens of each node and its ancestors, in place."""
    width = tokens.shape[1]
    for i in range(len(nodes)):
        above, back = nodes[i, PARENT], nodes[i, BACK_OF]
        if above >= 0:
            tokens[i] = tokens[above]
            farthest[i] = farthest[above]
        tokens[i, width - 1 - back] = token[i]
        farthest[i] = max(farthest[i], back)


def text_of_pattern(pattern: Sequence[int], text: Callable[[int], str]) -> str:
    """Write a pattern as text: tokens in quotes, * for any token, ^ for the context's start.

    >>> text_of_pattern([5, ANY, 7], {5: "Golden", 7: " Bridge"}.get)
    '"Golden" * " Bridge"'
    """
    words = {ANY: ANY_TEXT, START: START_TEXT}
    return " ".join(
        words[token] if token < 0 else json.dumps(text(token), ensure_ascii=False)
        for token in pattern
    )


def line_of(
    patterns: Sequence[tuple[Sequence[int], float]], n: int, text: Callable[[int], str]
) -> str:
    """Write patterns with their predictions on a line; n is the number of all patterns."""
    parts = [f"{text_of_pattern(pattern, text)} → {value:.3g}" for pattern, value in patterns]
    if n > len(parts):
        parts.append(f"{n - len(parts):,} more")
    return "; ".join(parts)


def printed_nodes(tries: Tries, latent: int) -> tuple[list[int], int]:
    """Choose the nodes of a latent that its text shows, at most 12, and count all that it could.

    A node is shown if it predicts a firing, those with most predicted activation over the training
    rows first. A node that predicts none is shown after its parent, if its parent predicts one.
    """
    first, last = int(tries.starts[latent]), int(tries.starts[latent + 1])
    value, nodes = tries.value[first:last], tries.nodes[first:last]
    fires = value >= tries.threshold[latent]
    weight = np.where(fires, value * np.maximum(nodes[:, ROWS], 1), 0)
    above = nodes[:, PARENT]
    exceptions = int((~fires & (above >= 0) & fires[np.maximum(above - first, 0)]).sum())
    order = np.argsort(-weight, kind="stable")[: min(PRINTED, int(fires.sum()))]
    shown: list[int] = []
    for node in order.tolist():
        shown.append(first + node)
        children = range(nodes[node, CHILD], nodes[node, CHILD] + nodes[node, CHILDREN])
        shown += [child for child in children if not fires[child - first]]
    return shown[:PRINTED], int(fires.sum()) + exceptions


def texts_of(tries: Tries, patterns: Patterns, text: Callable[[int], str]) -> list[str]:
    """Write the programs of latents as text, a line each; empty without a pattern that fires."""
    found = []
    for latent in range(len(tries)):
        shown, n = printed_nodes(tries, latent)
        some = [
            (
                patterns.token[patterns.ends[node] : patterns.ends[node + 1]].tolist(),
                float(patterns.value[node]),
            )
            for node in shown
        ]
        found.append(line_of(some, n, text))
    return found
