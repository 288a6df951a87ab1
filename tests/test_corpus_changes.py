"""A corpus that changes while it is harvested: named, and nothing of the new text is stored."""

from __future__ import annotations

import gzip
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import sae_harvest.harvest.run.driver
import sae_harvest.harvest.run.prepare
from sae_harvest.common.errors import InputError
from sae_harvest.harvest.run.config import HarvestConfig
from sae_harvest.harvest.run.driver import Execution, run
from sae_harvest.harvest.text import inputs
from sae_harvest.harvest.text.corpus import CorpusSpec, open_corpus
from sae_harvest.store.objects import open_objects
from sae_harvest.store.seals import sealed_counts

EARLIER = 1_600_000_000_000_000_000  # ns; so that a change within a clock tick is seen as well


def written(path: Path, text: str = "old", lines: int = 20_000) -> Path:
    data = "".join(json.dumps({"text": f"{text} {n:06}"}) + "\n" for n in range(lines)).encode()
    path.write_bytes(gzip.compress(data, 0) if path.suffix == ".gz" else data)
    os.utime(path, ns=(EARLIER, EARLIER))
    return path


def overwritten(path: Path) -> None:
    with path.open("r+b") as stream:
        stream.write(b'{"text": "new 000000"}\n' * 20_000)


def truncated(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def appended(path: Path) -> None:
    with path.open("ab") as stream:
        stream.write(b'{"text": "new"}\n')


def replaced(path: Path) -> None:
    other = written(path.with_name("other" + path.suffix), "new")
    os.utime(other)
    other.rename(path)


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".csv"])
@pytest.mark.parametrize("change", [overwritten, truncated, appended, replaced, Path.unlink])
def test_a_file_that_changes_while_it_is_read_is_named_and_no_new_text_comes_out(
    tmp_path: Path, suffix: str, change: Callable[[Path], object]
) -> None:
    if suffix == ".csv":
        path = tmp_path / "a.csv"
        path.write_text("text\n" + "".join(f"old {n:018}\n" for n in range(20_000)))
        os.utime(path, ns=(EARLIER, EARLIER))
    else:
        path = written(tmp_path / f"a{suffix}")
    documents = open_corpus(CorpusSpec(name=str(path))).documents()
    seen = [next(documents)]
    change(path)
    with pytest.raises(InputError) as caught:
        seen.extend(documents)
    message = str(caught.value)
    assert message.startswith(str(path))
    assert "since this harvest began" in message or "when this harvest began" in message
    assert message.endswith("harvest the new text into another --store.")
    assert "\n" not in message
    assert all(document.text.startswith("old") for document in seen)


def test_a_file_that_changes_between_two_readings_is_named(tmp_path: Path) -> None:
    written(tmp_path / "a.jsonl", lines=3)
    path = written(tmp_path / "b.jsonl", lines=3)
    corpus = open_corpus(CorpusSpec(name=str(tmp_path)))
    corpus.fingerprint()
    assert len(list(corpus.documents())) == 6
    corpus.require_unchanged()
    os.utime(path)
    for action in (corpus.require_unchanged, lambda: list(corpus.documents()), corpus.fingerprint):
        with pytest.raises(InputError, match=r"b\.jsonl has changed since .* last written"):
            action()
    written(path, "new", lines=3)  # of the same size, and with the time put back
    with pytest.raises(InputError, match=r"b\.jsonl has changed .* though not in size or time"):
        corpus.require_unchanged()


def configuration(model: Path, corpus: Path, **more: Any) -> HarvestConfig:
    given: dict[str, Any] = {"tokens": 4096, "shard_rows": 512, "context_length": 32} | more
    return HarvestConfig(
        model=str(model),
        corpus=CorpusSpec(name=str(corpus)),
        sites=("resid_post.1",),
        compute_dtype="float32",
        **given,
    )


@pytest.mark.usefixtures("unflushed")
def test_nothing_is_sealed_of_a_corpus_that_is_rewritten_and_put_back_it_goes_on(
    tmp_path: Path, model_folder: Path, corpus_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sae_harvest.harvest.run.prepare, "WINDOW_CONTEXTS", 16)
    monkeypatch.setattr(inputs, "READ_BYTES", 4096)
    path = Path(shutil.copy2(corpus_file, tmp_path / "a.jsonl"))
    kept = Path(shutil.copy2(corpus_file, tmp_path / "kept"))
    config = configuration(model_folder, path)
    local = Execution(workers=0, device="cpu")
    expected = run(config, tmp_path / "expected", local).digest
    place = tmp_path / "store"
    commit, count = sae_harvest.harvest.run.driver.commit_shard, 0

    def commit_and_rewrite(*arguments: Any) -> Any:
        nonlocal count
        count += 1
        record = commit(*arguments)
        if count == 2:
            path.write_bytes(kept.read_bytes().replace(b"senator", b"painter"))
        return record

    monkeypatch.setattr(sae_harvest.harvest.run.driver, "commit_shard", commit_and_rewrite)
    with pytest.raises(InputError, match=r"a\.jsonl has changed since this harvest began"):
        run(config, place, local)
    assert sealed_counts(open_objects(place)) == []
    shutil.copy2(kept, path)
    assert run(config, place, local).digest == expected


@pytest.mark.usefixtures("unflushed")
def test_text_under_the_same_size_and_time_is_found_before_the_seal(
    tmp_path: Path, model_folder: Path, corpus_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = Path(shutil.copy2(corpus_file, tmp_path / "a.jsonl"))
    before = path.stat()
    commit = sae_harvest.harvest.run.driver.commit_shard

    def commit_and_rewrite(*arguments: Any) -> Any:
        path.write_bytes(corpus_file.read_bytes().replace(b"senator", b"painter"))
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
        return commit(*arguments)

    monkeypatch.setattr(sae_harvest.harvest.run.driver, "commit_shard", commit_and_rewrite)
    with pytest.raises(InputError, match=r"though not in size or time; nothing is sealed"):
        run(configuration(model_folder, path, tokens=512), tmp_path / "store", Execution(workers=0))
    assert sealed_counts(open_objects(tmp_path / "store")) == []
