"""The identity of a corpus: fingerprints and full names, of folders and of buckets."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import IO

import pytest

from sae_harvest.harvest.text import inputs as inputs_module
from sae_harvest.harvest.text.corpus import CorpusSpec, open_corpus
from tests.corpora import ROWS, message, packed, read, write_csv, write_jsonl, write_parquet


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


@pytest.mark.usefixtures("no_hub")
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
    assert "so revision main does not apply" in message("s3://bucket", revision="main")
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
