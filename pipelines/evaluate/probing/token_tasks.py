"""The packaged tasks of tokens: labels of every row, from the tokens of a store and their texts.

Most tasks are patterns: a token is positive if a character of it, other than a space at its start,
is part of a match in the text of its context. A context's first word may be cut. The other tasks
look at the tokens themselves: whether a token continues a word, whether it, or the pair of it and
the token before, is repeated from earlier in the context, and whether it is one of the first of its
document.
"""

from __future__ import annotations

import re

import numpy as np
import numpy.typing as npt

from sae_harvest.pipelines.features.tables.texts import TokenTexts

BETWEEN = "\x00"  # after each context; no pattern matches it
MONTHS = "January|February|March|April|May|June|July|August|September|October|November|December"
DAYS = "Monday|Tuesday|Wednesday|Thursday|Friday|Saturday|Sunday"
FUNCTION_WORDS = {
    "article": "the|a|an",
    "preposition": "of|in|to|for|on|with|at|by|from|about|into|over|after|between|under|during",
    "pronoun": "I|you|he|she|it|we|they|me|him|her|us|them|who",
    "conjunction": "and|or|but|because|although|while|if",
    "auxiliary": "is|are|was|were|be|been|has|have|had|do|does|did|will|would|can|could|may|might"
    "|should|must",
    "negation": "not|no|never|none|nothing|nor|cannot|without",
}


def _word(words: str) -> re.Pattern[str]:
    return re.compile(rf"\b(?:{words})\b", re.IGNORECASE)


PATTERNS = {
    "capitalised word": re.compile(r"\b[^\W\d_a-z]\w*"),
    "word in capitals": re.compile(r"\b[A-Z]{2,}\b"),
    "number": re.compile(r"\d(?:[\d.,:]*\d)?"),
    "year": re.compile(r"\b(?:19|20)\d\d\b"),
    "amount of money": re.compile(r"[$€£]\s?\d[\d.,]*|\b\d[\d.,]*\s?(?:dollars|euros?|pounds)\b"),
    "percentage": re.compile(r"\b\d[\d.,]*\s?(?:%|percent\b|per cent\b)"),
    "month or day": re.compile(rf"\b(?:{MONTHS}|{DAYS})\b"),
    "quotation": re.compile(r"“[^”\x00]{1,500}”|\"[^\"\x00]{1,500}\""),
    "parentheses": re.compile(r"\([^()\x00]{1,300}\)"),
    "URL": re.compile(r"(?:https?://|www\.)[^\s\x00]+"),
    "punctuation": re.compile(r"[^\w\s\x00]"),
    "comma": re.compile(r","),
    "line break": re.compile(r"\n"),
    "sentence end": re.compile(r"[.!?][\"'”’)]*(?=[\s\x00])"),
    "question": re.compile(r"[^.!?\n\x00]*\?"),
    "first word of a sentence": re.compile(r"(?<=[.!?]\s)[^\W\d_]\w*"),
    "ends in -ing": re.compile(r"\b[a-z]{2,}ing\b"),
    "ends in -ed": re.compile(r"\b[a-z]{2,}ed\b"),
    "ends in -ly": re.compile(r"\b[a-z]{2,}ly\b"),
    "before a number": re.compile(r"\w+(?= \d)"),
    "before a capitalised word": re.compile(r"\w+(?= [A-Z])"),
    "letter beyond ASCII": re.compile(r"[^\W\d_\x00-\x7f]"),
    **{name: _word(words) for name, words in FUNCTION_WORDS.items()},
}
OTHERS = ("continued word", "repeated token", "repeated pair", "start of a document")
WORD = re.compile(r"\w+")
FIRST_TOKENS = 8  # of a document
TOKEN_TASKS = (*PATTERNS, *OTHERS)


def token_labels(
    tokens: npt.NDArray[np.int32], number: npt.NDArray[np.int64], texts: TokenTexts
) -> npt.NDArray[np.bool_]:
    """Label the rows of contexts.

    Args:
        tokens: int32 [contexts, length].
        number: int64 [contexts, length], each token's number in its document, from 0; -1 for a
            token without a document.
        texts: texts of the tokens.

    Returns:
        bool [contexts * length, tasks], in the order of `TOKEN_TASKS`.
    """
    labels = np.empty((tokens.size, len(TOKEN_TASKS)), np.bool_)
    strings, ends = texts.windows(tokens)
    joined = "".join(text + BETWEEN for text in strings.to_pylist())
    # where each token ends in the joined text, and where its first character that is no space is
    shift = np.concatenate([[0], (ends[:-1, -1] + len(BETWEEN)).cumsum()])
    stop = (ends + shift[:, None]).ravel().astype(np.int64)
    start = np.empty_like(stop)
    start[1:] = stop[:-1]
    start[:: tokens.shape[1]] = shift
    characters = np.frombuffer(joined.encode("utf-32-le"), np.uint32)
    filled = stop > start
    longer = stop > start + 1
    start[longer] += characters[start[longer]] == ord(" ")
    for column, pattern in enumerate(PATTERNS.values()):
        covered = np.concatenate([[0], _matched(pattern, joined).cumsum()])
        labels[:, column] = covered[stop] > covered[start]
    word = np.append(_matched(WORD, joined), False)
    pairs = np.full(tokens.shape, -1, np.int64)
    pairs[:, 1:] = tokens[:, :-1].astype(np.int64) << 32 | tokens[:, 1:]
    columns = (
        filled & word[start] & word[start - 1] & (start > 0),
        _repeated(tokens).ravel(),
        _repeated(pairs).ravel(),
        ((number >= 0) & (number < FIRST_TOKENS)).ravel(),
    )
    labels[:, len(PATTERNS) :] = np.stack(columns, axis=1)
    return labels


def _matched(pattern: re.Pattern[str], text: str) -> npt.NDArray[np.bool_]:
    """Return a mask of the characters that are part of a match, bool [characters]."""
    spans = np.array([match.span() for match in pattern.finditer(text)], np.int64).reshape(-1, 2)
    change = np.zeros(len(text) + 1, np.int64)
    np.add.at(change, spans[:, 0], 1)
    np.add.at(change, spans[:, 1], -1)
    return change[:-1].cumsum() > 0


def _repeated(ids: npt.NDArray[np.integer]) -> npt.NDArray[np.bool_]:
    """Return a mask of the ids that stand earlier in their row; shape of `ids`, [contexts, n]."""
    order = np.argsort(ids, axis=1, kind="stable")
    ordered = np.take_along_axis(ids, order, axis=1)
    again = np.zeros(ids.shape, np.bool_)
    again[:, 1:] = (ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)
    found = np.empty_like(again)
    np.put_along_axis(found, order, again, axis=1)
    return found
