"""The packaged tasks of whole texts: labels of the corpus `probes`, and of the articles of `news`.

domain …       articles, tweets or speeches, against the other two
site …         articles of one site, against the other sites
account …      tweets of one account, against the other accounts (links are removed)
tweet …        tweets with a link, a mention, a hashtag or a question, or repeated from others
language …     speeches in one language, against the other languages
chair …        the chair, against other speakers in the same language
party …        members of one party, against other members of the same parliament
agenda …       items of the agenda whose title has a word, against the other titles
period …       speeches after a year that halves the sample, against earlier ones
question …     speeches with a question mark in a language, against those without
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from statistics import median

import numpy as np

from sae_harvest.harvest.text.probes import (
    CHAIR,
    NEWS,
    PARLIAMENT,
    PARLIAMENTS,
    TWEETS,
    WITH_LINK,
    LabelledText,
    news_articles,
    probe_texts,
)
from sae_harvest.pipelines.evaluate.probing.tasks import Task, text_hashes

FEWEST = 25  # texts of a party that make a task
AGENDAS = (("en", "oral answers"), ("en", "bill"), ("es", "proyecto de ley"), ("es", "del grupo"))
QUESTIONS = ("de", "en", "nl")  # few Spanish speeches of the sample have a question mark
TWEET_SIGNS = {
    "mention": re.compile(r"@\w"),
    "hashtag": re.compile(r"#\w"),
    "question": re.compile(r"\?"),
    "repeated": re.compile(r"RT @|RT:"),
}
Choice = Callable[[LabelledText], bool]


def text_tasks() -> list[Task]:
    """Return the packaged tasks of texts.

    Raises:
        InputError: the package with the texts is not installed, or damaged.
    """
    sample = probe_texts()
    shown = {text.text for text in sample}
    articles = [text for text in news_articles() if text.text not in shown]
    texts = [*sample, *{text.text: text for text in articles}.values()]
    hashes = dict(zip(map(id, texts), text_hashes([text.text for text in texts]), strict=True))
    tasks = []
    for name, inside, positive in _choices(sample):
        chosen = [text for text in texts if inside(text)]
        keys = np.array([hashes[id(text)] for text in chosen], np.uint64)
        labels = np.array([positive(text) for text in chosen], np.bool_)
        tasks.append(Task(name, "text", keys, labels))
    return tasks


def _choices(texts: Sequence[LabelledText]) -> Iterator[tuple[str, Choice, Choice]]:
    """Yield the name of each task, which texts are in it, and which of them are positive."""
    for domain in (NEWS, TWEETS, PARLIAMENT):
        yield f"domain {domain}", lambda text: True, _is(domain=domain)
    for site in _values(texts, "source", _is(domain=NEWS)):
        yield f"site {site}", _is(domain=NEWS), _is(source=site)
    accounts = _both(_is(domain=TWEETS), _differs(source=WITH_LINK))
    for account in _values(texts, "source", accounts):
        yield f"account {account}", accounts, _is(source=account)
    yield "tweet link", _is(domain=TWEETS), _is(source=WITH_LINK)
    for sign, pattern in TWEET_SIGNS.items():
        yield f"tweet {sign}", accounts, _has(pattern)
    for language in PARLIAMENTS:
        yield f"language {language}", _is(domain=PARLIAMENT), _is(source=language)
    for language in PARLIAMENTS:
        yield f"chair {language}", _of(language), _is(party=CHAIR)
    for language in PARLIAMENTS:
        members = _both(_of(language), _both(_differs(party=CHAIR), _differs(party="other")))
        for party in _values(texts, "party", members):
            yield f"party {language} {party}", members, _is(party=party)
    for language, title in AGENDAS:
        members = _both(_of(language), _both(_differs(party=CHAIR), _differs(agenda="")))
        yield f"agenda {language} {title}", members, _entitled(title)
    for language in PARLIAMENTS:
        middle = int(median(text.year for text in texts if _of(language)(text)))
        yield f"period {language} after {middle}", _of(language), _after(middle)
    for language in QUESTIONS:
        yield f"question {language}", _of(language), _has(TWEET_SIGNS["question"])


def _values(texts: Sequence[LabelledText], column: str, inside: Choice) -> list[str]:
    """Return the values of a column that enough texts have, sorted."""
    counts = Counter(getattr(text, column) for text in texts if inside(text))
    return sorted(value for value, count in counts.items() if count >= FEWEST)


def _of(language: str) -> Choice:
    return _is(domain=PARLIAMENT, source=language)


def _is(**wanted: str) -> Choice:
    return lambda text: all(getattr(text, name) == value for name, value in wanted.items())


def _differs(**unwanted: str) -> Choice:
    return lambda text: all(getattr(text, name) != value for name, value in unwanted.items())


def _both(one: Choice, other: Choice) -> Choice:
    return lambda text: one(text) and other(text)


def _has(pattern: re.Pattern[str]) -> Choice:
    return lambda text: pattern.search(text.text) is not None


def _entitled(title: str) -> Choice:
    return lambda text: title in text.agenda.lower()


def _after(year: int) -> Choice:
    return lambda text: text.year > year
