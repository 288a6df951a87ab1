"""Long texts in segments that have the same tokens as the whole text.

A tokenizer keeps about 500 bytes for each token until its text is done, so a text of many megabytes
is tokenized in segments. A cut is in front of white space, and only if a sample of the text around
the cut has the same tokens, at the same characters, whole as in two parts. A cut *at* a space,
which then belongs to neither part, is tried as well: it suits tokenizers that put a space before
every text. If no cut is exact, the segment becomes longer, if necessary up to the end of the text.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import islice
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from tokenizers import Tokenizer

SEGMENT_CHARS = 250_000
SAMPLE_CHARS = 1_000  # on each side of a cut
TRIES = 8  # cuts tried before the segment becomes longer by SEGMENT_CHARS

_GAP = re.compile(r"(?<=\S)\s")

Span = tuple[int, int]


class Segment(NamedTuple):
    """Part of a text, to be tokenized by itself."""

    text: str
    """The characters to tokenize."""
    start: int
    """Index of the first character in the whole text."""
    before: int
    """Characters in front of it that belong to its first token, and are not in `text`."""

    def is_last_of(self, text: str) -> bool:
        return self.start + len(self.text) == len(text)


def segments(text: str, tokenizer: Tokenizer) -> Iterator[Segment]:
    """Yield segments of the text, in order, of a little more than `SEGMENT_CHARS` characters."""
    start, before = 0, 0
    while cut := _next_cut(text, start + SEGMENT_CHARS, tokenizer):
        end, resume = cut
        yield Segment(text[start:end], start, before)
        start, before = resume, resume - end
    yield Segment(text[start:] if start else text, start, before)


def _next_cut(text: str, target: int, tokenizer: Tokenizer) -> Span | None:
    """Find the end of the next segment, at `target` or later, and the start of the one after."""
    while gaps := [gap.start() for gap in islice(_GAP.finditer(text, target), TRIES)]:
        for gap in gaps:
            if cut := _cut_at(text, gap, tokenizer):
                return cut
        target = max(target + SEGMENT_CHARS, gaps[-1] + 1)
    return None


def _cut_at(text: str, gap: int, tokenizer: Tokenizer) -> Span | None:
    """Return the cut before the white space at `gap`, else the cut without it, if exact."""
    first, last = max(0, gap - SAMPLE_CHARS), gap + SAMPLE_CHARS
    whole = _tokens(text[first:last], tokenizer, 0)
    left = _tokens(text[first:gap], tokenizer, 0)
    right = _tokens(text[gap:last], tokenizer, gap - first)
    if left + right == whole:
        return gap, gap
    if text[gap] == " " and not text[gap + 1 : gap + 2].isspace():
        right = _tokens(text[gap + 1 : last], tokenizer, gap + 1 - first)
        if right:
            token, begin, end = right[0]
            if [*left, (token, begin - 1, end), *right[1:]] == whole:
                return gap, gap + 1
    return None


def _tokens(text: str, tokenizer: Tokenizer, shift: int) -> list[tuple[int, int, int]]:
    """Return token ids with their characters, counted from `shift`."""
    encoding = tokenizer.encode(text, add_special_tokens=False)
    pairs = zip(encoding.ids, encoding.offsets, strict=True)
    return [(token, begin + shift, end + shift) for token, (begin, end) in pairs]
