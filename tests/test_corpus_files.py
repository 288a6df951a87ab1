"""Folders of a corpus: what is read, and what is left out and why; JSON, zst and Parquet files."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import parquet

from sae_harvest.harvest.text import jsonarrays
from sae_harvest.harvest.text.corpus import CorpusSpec, open_corpus
from sae_harvest.harvest.text.folders import left_out_sentence
from sae_harvest.harvest.text.inputs import SUFFIXES
from tests.commands import invoke, options
from tests.corpora import message, packed, read

LINE = '{"text": "x"}\n'


def texts(name: object, **given: str) -> list[str]:
    return [document.text for document in read(name, **given)]


@pytest.mark.parametrize(
    "name", ["a.ndjson", "a.json", "a.JSON.gz", "c4-train.00000-of-01024.json.gz", "a.ndjson.zst"]
)
def test_lines_of_json_are_read_whatever_their_ending(tmp_path: Path, name: str) -> None:
    data = (LINE * 3).encode()
    suffix = Path(name).suffix
    (tmp_path / name).write_bytes(packed(data, suffix) if suffix in (".gz", ".zst") else data)
    assert texts(tmp_path) == texts(tmp_path / name) == ["x"] * 3


def test_parq_is_parquet(tmp_path: Path) -> None:
    parquet.write_table(pa.table({"text": ["x", "y"]}), tmp_path / "a.parq")
    assert texts(tmp_path) == ["x", "y"]


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("name", ["a.json", "a.json.gz"])
def test_an_array_of_objects_is_read_an_object_at_a_time_from_any_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, indent: int | None, name: str
) -> None:
    rows: list[dict[str, Any]] = [
        {"text": f'{n} [{{"é\\]' * (n % 7), "id": n, "of": [1.5, {"deep": [n]}]} for n in range(40)
    ]
    data = ("\ufeff \n" + json.dumps(rows, indent=indent) + "\n").encode()
    path = tmp_path / name
    path.write_bytes(packed(data, ".gz") if name.endswith(".gz") else data)
    corpus = open_corpus(CorpusSpec(name=str(path)))
    for block in (1, 7, 1 << 20):
        monkeypatch.setattr(jsonarrays, "BLOCK_CHARS", block)
        placed = list(corpus.placed())
        expected = [(str(row["id"]), row["text"]) for row in rows if row["text"]]
        assert [(d.id, d.text) for d, _ in placed] == expected
    for number, (_, cursor) in enumerate(placed[:-1], start=1):
        cursor = json.loads(json.dumps(cursor))
        assert [d.id for d in corpus.documents(cursor)] == [i for i, _ in expected[number:]]


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ('[{"text": "x"}, 3]', "element 2, is not JSON (expected an object"),
        ('[{"text": "x"} {"text": "y"}]', "element 2, is not JSON (expected , or ]"),
        ('[{"text": "x"},', "element 2, is not JSON (expected an object"),
        ('[{"text": "x"}', "element 2, is not JSON (it ends within the array"),
        ('[{"text": "x', "element 1, is not JSON (it ends within an object"),
        ('[{"text": x}' + " " * 99 + "]", "element 1, is not JSON (Expecting value"),
        ('[{"text": "x"}]]', "element 2, is not JSON (there is text after the array"),
        ("[" * 3, "element 1, is not JSON (expected an object"),
        ('[{"a": ' + "[" * 100_000, "element 1, is not JSON (nested too deeply"),
        ('[{"a": ' + "9" * 5_000 + "}]", "element 1, is not JSON (Exceeds the limit"),
        ("[]", "holds no text"),
    ],
)
def test_what_is_no_array_of_objects_is_refused_in_one_sentence(
    tmp_path: Path, text: str, why: str
) -> None:
    path = tmp_path / "a.json"
    path.write_text(text)
    assert why in message(path)


def test_links_are_followed_once_and_all_that_is_left_out_is_named(tmp_path: Path) -> None:
    corpus, elsewhere = tmp_path / "corpus", tmp_path / "elsewhere"
    for folder in (corpus / "sub", corpus / ".git", elsewhere / "deep"):
        folder.mkdir(parents=True)
    (elsewhere / "deep" / "b.jsonl").write_text('{"text": "linked"}\n')
    (elsewhere / "loop").symlink_to(corpus)
    (corpus / "link").symlink_to(elsewhere)
    (corpus / "sub" / "again").symlink_to(elsewhere / "deep")
    (corpus / "sub" / "self").symlink_to("self")
    (corpus / "gone.jsonl").symlink_to("nowhere.jsonl")
    (corpus / "z.jsonl").symlink_to(elsewhere / "deep" / "b.jsonl")
    (corpus / ".hidden.jsonl").write_text(LINE)
    (corpus / ".git" / "a.jsonl").write_text(LINE)
    os.mkfifo(corpus / "pipe.jsonl")
    for number in range(7):
        (corpus / f"{number}.pdf").touch()
    Path(os.fsdecode(os.fsencode(corpus) + b"/\xff.jsonl")).write_text(LINE)
    opened = open_corpus(CorpusSpec(name=str(corpus)))
    assert [(d.source, d.text) for d in opened.documents()] == [
        ("link/deep/b.jsonl", "linked"),
        ("z.jsonl", "linked"),
    ]
    left = dict(opened.left_out)
    assert left.pop("gone.jsonl").startswith("a broken link (No such file")
    assert left.pop("sub/self").startswith("a broken link (Too many levels")
    assert left.pop("sub/again") == "the same folder as link/deep"
    assert left.pop("link/loop") == f"the same folder as {corpus}"
    assert left.pop("pipe.jsonl") == "neither a file nor a folder"
    assert left.pop("\\udcff.jsonl") == "the name is not UTF-8"
    assert {left.pop(name) for name in (".git", ".hidden.jsonl")} == {"hidden"}
    assert set(left) == {f"{number}.pdf" for number in range(7)}
    short = left_out_sentence("it", opened.left_out)
    assert "0.pdf, 1.pdf, 2.pdf, 3.pdf, 4.pdf and 2 more (files with this ending" in short
    assert "6.pdf" in left_out_sentence("it", opened.left_out, max_names=None)
    assert "\n" not in short


def test_a_folder_with_nothing_to_read_says_what_it_has(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl.bz2").touch()
    text = message(tmp_path)
    assert all(suffix in text for suffix in SUFFIXES)
    assert text.endswith("Left out of it: a.jsonl.bz2 (files with this ending are not read).")


def test_a_harvest_tells_what_is_left_out_once_and_its_log_names_all(
    tmp_path: Path, model_folder: Path, corpus_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SAE_HARVEST_CACHE", str(tmp_path / "cache"))
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    (corpus / "a.jsonl").symlink_to(corpus_file)
    for number in range(9):
        (corpus / f"{number}.pdf").touch()
    given = options(model_folder, corpus, tmp_path / "store", tokens=1024)
    result = invoke(*given)
    assert result.exit_code == 0, result.output
    assert result.stderr.count("Left out of ") == 1
    assert "4.pdf and 4 more" in result.stderr
    (log,) = (tmp_path / "cache" / "logs").iterdir()
    assert all(f"{number}.pdf" in log.read_text() for number in range(9))


def test_parquet_text_in_bytes_is_read_as_utf8(tmp_path: Path) -> None:
    for kind in (pa.binary(), pa.large_binary(), pa.large_string(), pa.string()):
        rows = [None, "é", "x", "é"]
        data = [row.encode() if row and pa.types.is_binary(kind) else row for row in rows]
        table = pa.table({"text": pa.array(data).cast(kind), "id": pa.array([b"\xff", b"b"] * 2)})
        parquet.write_table(table, tmp_path / "a.parquet", row_group_size=3)
        found = read(tmp_path)
        assert [(d.id, d.text) for d in found] == [("b", "é"), ("\ufffd", "x"), ("b", "é")]
    parquet.write_table(pa.table({"text": [b"x", b"\xff"]}), tmp_path / "a.parquet")
    assert "row 2, holds bytes that are not UTF-8; convert them" in message(tmp_path)


def zstd_frame(text: bytes, window_log: int) -> bytes:
    """One raw block that asks for a window of 2^window_log bytes."""
    block = (len(text) << 3 | 1).to_bytes(3, "little") + text
    return b"\x28\xb5\x2f\xfd\x00" + bytes([(window_log - 10) << 3]) + block


def test_a_zst_window_is_read_up_to_128_mib_and_a_larger_one_is_told_from_damage(
    tmp_path: Path,
) -> None:
    path = tmp_path / "a.jsonl.zst"
    path.write_bytes(zstd_frame(LINE.encode(), 27))
    assert texts(path) == ["x"]
    for head in (b"", zstd_frame(LINE.encode(), 27)):
        path.write_bytes(head + zstd_frame(LINE.encode(), 31))
        text = message(path)
        assert "takes more than 128 MiB of memory for its window" in text
        assert "`zstd -d --long=31`" in text
