"""Rows of random tokens, and latents whose program is known."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from sae_harvest.pipelines.evaluate.programs.scoring import SplitFirings
from sae_harvest.pipelines.evaluate.programs.suffixes import START, Suffixes, TokenRows
from sae_harvest.pipelines.evaluate.programs.tries import BACK_OF, PARENT, PATTERN, Tries

A, B, LENGTH = 0, 1, 16
ANY = None


@dataclass(frozen=True)
class Known:
    """A latent that is a function of tokens, and the patterns of its program with their values."""

    activation: Callable[[TokenRows], np.ndarray]
    patterns: dict[tuple[int | None, ...], float]


def made_rows(n_contexts: int = 300, vocabulary: int = 8, seed: int = 0) -> TokenRows:
    """Random tokens; a third of the contexts are held out, and each is a cluster modulo 256."""
    rng = np.random.default_rng(seed)
    context = np.arange(n_contexts).repeat(LENGTH)
    read = rng.random(len(context)) < 0.95
    test = context % 3 == 0
    return TokenRows(
        rng.integers(0, vocabulary, len(context)).astype(np.int32),
        read & ~test,
        read & test,
        (context % 256).astype(np.uint8),
        LENGTH,
    )


def on_a(rows: TokenRows) -> np.ndarray:
    return 3.0 * (rows.token == A)


def on_b_after_a(rows: TokenRows) -> np.ndarray:
    return 2.5 * ((rows.token == B) & (rows.before(1) == A))


def on_b_two_after_a(rows: TokenRows) -> np.ndarray:
    return 7.5 * ((rows.token == B) & (rows.before(2) == A))


def on_b_unless_after_a(rows: TokenRows) -> np.ndarray:
    return 1.5 * ((rows.token == B) & (rows.before(1) != A))


def at_the_start(rows: TokenRows) -> np.ndarray:
    return 4.0 * ((rows.token == B) & (rows.before(1) == START))


CASES = {
    "fires on A": Known(on_a, {(A,): 3.0}),
    "fires on B after A": Known(on_b_after_a, {(B,): 0.0, (A, B): 2.5}),
    "fires on B two after A": Known(on_b_two_after_a, {(B,): 0.0, (A, ANY, B): 7.5}),
    "fires on B unless after A": Known(on_b_unless_after_a, {(B,): 1.5, (A, B): 0.0}),
    "fires on B at the start": Known(at_the_start, {(B,): 0.0, (START, B): 4.0}),
}


def firings_of(dense: np.ndarray, mask: np.ndarray) -> SplitFirings:
    """The firings of one latent, [rows], or of several, [latents, rows], on some rows."""
    latent, row = np.nonzero(np.atleast_2d(dense) * mask)
    counts = np.bincount(latent, minlength=len(np.atleast_2d(dense)))
    value = np.atleast_2d(dense)[latent, row].astype(np.float32)
    return SplitFirings(np.concatenate([[0], np.cumsum(counts)]), row, value)


def program_of(
    suffixes: Suffixes, tries: Tries, latent: int = 0
) -> dict[tuple[int | None, ...], float]:
    """A program's patterns, farthest token first, with what they predict."""
    found = {}
    for node in range(tries.starts[latent], tries.starts[latent + 1]):
        tokens: dict[int, int] = {}
        at = node
        while at >= 0:
            back = int(tries.nodes[at, BACK_OF])
            tokens[back] = suffixes.token(tries.nodes[at, PATTERN], back)
            at = int(tries.nodes[at, PARENT])
        pattern = tuple(tokens.get(back, ANY) for back in range(max(tokens), -1, -1))
        found[pattern] = float(tries.value[node])
    return found


def noisy(rows: TokenRows, seed: int = 1) -> np.ndarray:
    """Latents that follow tokens with noise, and with many equal activations [4, rows]."""
    rng = np.random.default_rng(seed)
    n = len(rows.token)
    chance = np.stack(
        [
            0.1 + 0.7 * (rows.token == A),
            np.where(on_b_after_a(rows) > 0, 0.9, 0.05 * (rows.token < 4)),
            np.where(on_b_unless_after_a(rows) > 0, 0.8, 0.02),
            0.05 * rows.token,
        ]
    )
    level = 1 + rows.before(2) % 3 + rng.integers(0, 3, (4, n)) / 2
    return np.where(rng.random((4, n)) < chance, level, 0.0)


def predicted(suffixes: Suffixes, tries: Tries, latent: int = 0) -> np.ndarray:
    """What a program predicts on each row: the pattern with most tokens that matches decides."""
    rows = suffixes.rows
    best, found = np.zeros(len(rows.token)), np.zeros(len(rows.token))
    for pattern, value in program_of(suffixes, tries, latent).items():
        matches = np.ones(len(rows.token), bool)
        for back, token in enumerate(reversed(pattern)):
            if token is not ANY:
                matches &= rows.before(back) == token
        n_tokens = sum(token is not ANY for token in pattern)
        matches &= n_tokens > best
        best[matches], found[matches] = n_tokens, value
    return found


def slow_scores(
    x: np.ndarray, y: np.ndarray, threshold: float, weight: np.ndarray | None = None
) -> tuple[list[float], list[float]]:
    """The metrics by their definitions, and the recall of each tenth of the firings."""
    w = np.ones(len(x)) if weight is None else weight
    fires, hit = y > 0, x >= threshold
    caught = w[fires & hit].sum()
    precision = caught / w[hit].sum() if hit.any() else 0.0
    recall = caught / w[fires].sum()
    f1 = 2 * caught / (w[hit].sum() + w[fires].sum())
    auprc, before = 0.0, 0.0
    for level in sorted(set(x.tolist()), reverse=True):
        here = x >= level
        reached = w[here & fires].sum() / w[fires].sum()
        auprc += (reached - before) * w[here & fires].sum() / w[here].sum()
        before = reached
    pearson = np.corrcoef(x, y)[0, 1]
    spearman = np.corrcoef(midranks(x), midranks(y))[0, 1]
    order = np.flatnonzero(fires)[np.argsort(y[fires], kind="stable")]
    tenths = [order[[p for p in range(len(order)) if p * 10 // len(order) == t]] for t in range(10)]
    by_tenth = [float(hit[some].mean()) if len(some) else np.nan for some in tenths]
    return [precision, recall, f1, auprc, pearson, spearman], by_tenth


def midranks(x: np.ndarray) -> np.ndarray:
    """Ranks from 1; equal numbers share the mean of theirs."""
    ordered = np.sort(x)
    low, high = np.searchsorted(ordered, x, "left"), np.searchsorted(ordered, x, "right")
    return (low + 1 + high) / 2
