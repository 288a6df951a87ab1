"""The set of texts that were seen: what it knows, and what it weighs."""

from __future__ import annotations

import random
import tracemalloc

import numpy as np
import pytest
import xxhash

from sae_harvest.harvest.text import duplicates
from sae_harvest.harvest.text.documents import Document
from sae_harvest.harvest.text.duplicates import HashSet, without_duplicates


def test_it_knows_what_a_set_of_python_knows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(duplicates, "_MIN_RECENT", 10)
    rng = random.Random(0)
    begun = [rng.getrandbits(64) for _ in range(50)] + [0, 2**64 - 1]
    ours = HashSet([np.array(begun[:20], np.uint64), np.array(begun, np.uint64)])
    known = set(begun)
    for _ in range(3_000):
        value = rng.choice([rng.getrandbits(64), rng.randrange(200), rng.choice(begun)])
        assert ours.add(value) == (value not in known)
        known.add(value)
        assert len(ours) == len(known)


@pytest.mark.slow
def test_it_weighs_under_16_bytes_a_document() -> None:
    count = 1_000_000
    tracemalloc.start()
    ours = HashSet([np.random.default_rng(0).integers(0, 2**64, count, dtype=np.uint64)])
    for value in np.random.default_rng(1).integers(0, 2**64, count // 10, dtype=np.uint64).tolist():
        ours.add(value)
    now, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert now < 16 * len(ours)


def test_the_first_of_equal_texts_stays() -> None:
    texts = ["a", "b", "a", "a ", "b", "c", "é"]
    documents = [(Document(str(n), "s", None, None, t), {"at": n}) for n, t in enumerate(texts)]
    assert [after["at"] for _, after in without_duplicates(documents)] == [0, 1, 3, 5, 6]
    seen = np.array([xxhash.xxh3_64_intdigest(text.encode()) for text in ("é", "b")], np.uint64)
    kept = [after["at"] for _, after in without_duplicates(documents, [seen])]
    assert kept == [0, 3, 5]
