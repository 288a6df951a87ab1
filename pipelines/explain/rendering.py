"""Excerpts as text: marked tokens, numbers from 0 to 9, lists."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt

from sae_harvest.pipelines.explain.excerpts import Excerpt

LEVELS = 10  # numbers from 0 to 9, each one token for every tokenizer; many have none for 10
MARKED_SHARE = 0.3  # of the largest activation in an excerpt, from which a token is marked
OPEN, CLOSE = "<<", ">>"
UNKNOWN = "?"
NOTHING = "(none)"

Bools = npt.NDArray[np.bool_]


def active(excerpt: Excerpt) -> Bools:
    """Return the tokens that are marked as active; none in a silent excerpt [tokens]."""
    a = excerpt.activations
    return (a > 0) & (a >= MARKED_SHARE * a.max(initial=0))


def marked(excerpt: Excerpt, which: Bools | None = None) -> str:
    """Return the text on one line, with marks around some tokens.

    Spaces at the edge of a marked part stay outside the marks.

    Args:
        excerpt: the excerpt.
        which: the tokens; None: those on which the latent is active.
    """
    return marked_text(excerpt.texts, active(excerpt) if which is None else which)


def marked_text(texts: Sequence[str], which: Bools) -> str:
    """Return the text of tokens on one line, with marks around some of them; see `marked`."""
    parts, inside, run = list[str](), False, ""
    for text, mark in zip([*texts, ""], [*which.tolist(), False], strict=True):
        if mark != inside:
            parts.append(_wrapped(run) if inside else run)
            run, inside = "", mark
        run += text
    parts.append(run)
    return one_line("".join(parts))


def _wrapped(text: str) -> str:
    bare = text.strip()
    if not bare:
        return f"{OPEN}{text}{CLOSE}"
    start = text.index(bare)
    return f"{text[:start]}{OPEN}{bare}{CLOSE}{text[start + len(bare) :]}"


def one_line(text: str) -> str:
    """Return a text without line ends, and without spaces around it."""
    return " ".join(text.split("\n")).strip()


def levels(activations: npt.NDArray[np.float32], largest: float) -> npt.NDArray[np.int64]:
    """Return activations as numbers from 0 to 9: tenths of the largest one, rounded down."""
    tenths = np.floor(LEVELS * np.maximum(activations, 0) / max(largest, 1e-12))
    return np.minimum(tenths, LEVELS - 1).astype(np.int64)


def unit_of(largest: float) -> float:
    """Return the activation that a level stands for; the largest one has the level 9."""
    return largest / (LEVELS - 1)


def lines(texts: Sequence[str], values: Iterable[str]) -> str:
    """Return a line for each token: its text, a tab, a value."""
    return "\n".join(f"{escaped(text)}\t{value}" for text, value in zip(texts, values, strict=True))


def escaped(text: str) -> str:
    """Return a token's text with line ends and tabs as they are written in code."""
    return text.replace("\n", "\\n").replace("\t", "\\t").replace("\r", "\\r")


def slots(texts: Sequence[str]) -> tuple[int, ...]:
    """Return the places of the values in `lines` with unknown values, in characters."""
    found, at = [], 0
    for text in texts:
        at += len(escaped(text)) + 1
        found.append(at)
        at += len(UNKNOWN) + 1
    return tuple(found)


def numbered(texts: Iterable[str]) -> str:
    """Return a list with numbers from 1, or a word for an empty one."""
    return "\n".join(f"{n}. {text}" for n, text in enumerate(texts, 1)) or NOTHING


def quoted(texts: Iterable[str]) -> str:
    """Return texts in quotation marks, with commas between, or a word for none."""
    return ", ".join(f'"{escaped(text)}"' for text in texts) or NOTHING
