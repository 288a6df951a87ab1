"""A harvest of all that a corpus holds: whole contexts, the last shard a short one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NoReturn

import pytest

import sae_harvest.harvest.run.driver
from sae_harvest.common.errors import InputError
from sae_harvest.harvest.run.config import HarvestConfig
from sae_harvest.harvest.run.prepare import prepare
from sae_harvest.harvest.run.status import describe_status
from sae_harvest.harvest.text.corpus import CorpusSpec, HubCorpus
from sae_harvest.harvest.tokens.shards import missing, runs
from sae_harvest.store.objects import open_objects
from sae_harvest.store.reader import ActivationStore
from tests.commands import invoke, options, refusal

pytestmark = pytest.mark.usefixtures("unflushed")


@pytest.fixture(scope="module")
def short_corpus(tmp_path_factory: pytest.TempPathFactory, corpus_file: Path) -> Path:
    """The first 30 documents: some thousand tokens, and no whole number of shards."""
    path = tmp_path_factory.mktemp("short") / "short.jsonl"
    path.write_text("".join(corpus_file.read_text().splitlines(keepends=True)[:30]))
    return path


@pytest.fixture(scope="module")
def whole(
    tmp_path_factory: pytest.TempPathFactory, model_folder: Path, short_corpus: Path
) -> tuple[Path, Any]:
    store = tmp_path_factory.mktemp("whole") / "store"
    return store, invoke(*options(model_folder, short_corpus, store, tokens=None))


def no_workers(*_: object) -> NoReturn:
    raise AssertionError("the model was loaded")


def test_without_tokens_the_corpus_is_taken_whole_and_sealed(whole: tuple[Path, Any]) -> None:
    path, result = whole
    assert result.exit_code == 0, result.output
    store = ActivationStore.open(path)
    assert store.n_rows > 3_000
    assert store.n_rows % 32 == 0
    assert store.n_rows % 1024 != 0
    assert f"The corpus holds {store.n_rows:,} tokens in whole contexts. Digest" in result.stdout
    assert "sealed; not running" in describe_status(open_objects(path))


def test_the_same_command_again_has_nothing_to_do(
    whole: tuple[Path, Any],
    model_folder: Path,
    short_corpus: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path, first = whole
    monkeypatch.setattr(sae_harvest.harvest.run.driver, "open_pool", no_workers)
    for tokens in (None, "all"):
        again = invoke(*options(model_folder, short_corpus, path, tokens=tokens))
        assert again.exit_code == 0, again.output
        assert "0 of them now" in again.stdout
        assert again.stdout.split("Digest")[1] == first.stdout.split("Digest")[1]


def test_a_part_grows_to_the_whole_and_gives_the_same_bytes(
    tmp_path: Path, whole: tuple[Path, Any], model_folder: Path, short_corpus: Path
) -> None:
    digest = ActivationStore.open(whole[0]).digest
    grown = tmp_path / "grown"
    assert invoke(*options(model_folder, short_corpus, grown, tokens=2048)).exit_code == 0
    assert invoke(*options(model_folder, short_corpus, grown, tokens="all")).exit_code == 0
    assert ActivationStore.open(grown).digest == digest
    parts = tmp_path / "parts"
    for shards in ("2:100", "0:2"):
        given = options(model_folder, short_corpus, parts, tokens="all", shards=shards)
        assert invoke(*given).exit_code == 0
    assert ActivationStore.open(parts).digest == digest


def test_a_corpus_of_whole_shards_ends_with_a_full_one(
    tmp_path: Path,
    whole: tuple[Path, Any],
    model_folder: Path,
    short_corpus: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rows = ActivationStore.open(whole[0]).n_rows
    given = options(model_folder, short_corpus, tmp_path / "s", tokens=None, shard_rows=rows)
    first = digest_of_whole(invoke(*given))
    monkeypatch.setattr(sae_harvest.harvest.run.driver, "open_pool", no_workers)
    assert digest_of_whole(invoke(*given)) == first
    status = describe_status(open_objects(tmp_path / "s"))
    assert status == "1 shard committed, all sealed; not running"


def digest_of_whole(result: Any) -> str:
    assert result.exit_code == 0, result.output
    return str(result.stdout.split("Digest ")[1])


def test_an_interrupted_harvest_of_all_goes_on(
    tmp_path: Path,
    whole: tuple[Path, Any],
    model_folder: Path,
    short_corpus: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    commit, count = sae_harvest.harvest.run.driver.commit_shard, 0

    def interrupted(*arguments: Any) -> Any:
        nonlocal count
        count += 1
        if count == 2:
            raise KeyboardInterrupt
        return commit(*arguments)

    given = options(model_folder, short_corpus, tmp_path / "s", tokens="all")
    with monkeypatch.context() as patch:
        patch.setattr(sae_harvest.harvest.run.driver, "commit_shard", interrupted)
        assert invoke(*given).exit_code == 130
    status = describe_status(open_objects(tmp_path / "s"))
    assert status.startswith("1 shard committed, of as many as the corpus fills; not running")
    assert invoke(*given).exit_code == 0
    assert ActivationStore.open(tmp_path / "s").digest == ActivationStore.open(whole[0]).digest


def test_a_number_that_the_corpus_lacks_is_said_before_any_work(
    tmp_path: Path,
    whole: tuple[Path, Any],
    model_folder: Path,
    short_corpus: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sae_harvest.harvest.run.driver, "open_pool", no_workers)
    rows = ActivationStore.open(whole[0]).n_rows
    given = options(model_folder, short_corpus, tmp_path / "s", tokens="1M")
    text = refusal(invoke(*given))
    assert f"holds {rows:,} tokens in whole contexts of 32, fewer than the 1,000,000" in text
    assert f"use --tokens {rows} or a larger corpus, or take all of it with --tokens all." in text
    assert not (tmp_path / "s").exists()
    (tmp_path / "tiny.txt").write_text("the cat")
    given = options(model_folder, tmp_path / "tiny.txt", tmp_path / "s", tokens=None)
    assert "holds 0 tokens in whole contexts of 32, not even one; use a shorter" in refusal(
        invoke(*given)
    )


def test_plan_of_a_whole_corpus(model_folder: Path, short_corpus: Path) -> None:
    arguments = ("--model", model_folder, "--corpus", short_corpus, "--layer", 1)
    result = invoke("plan", *arguments, "--context-length", 32)
    assert result.exit_code == 0, result.output
    assert "all that the corpus holds, in contexts of 32" in " ".join(result.stdout.split())
    assert "64,000,000 (float16, 32 wide)" in result.stdout


def test_a_dataset_of_the_hub_is_read_to_its_end_only_where_that_is_said(
    tmp_path: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "train.jsonl").write_text(json.dumps({"text": "the cat"}) + "\n")
    # a local dataset goes the way of a hub one inside `datasets`
    monkeypatch.setattr("sae_harvest.harvest.run.prepare.open_corpus", HubCorpus)
    given: dict[str, Any] = {
        "model": str(model_folder),
        "corpus": CorpusSpec(name=str(tmp_path)),
        "sites": ("resid_post.1",),
        "context_length": 32,
    }
    with pytest.raises(InputError, match="say how many tokens to take, with --tokens 1M say"):
        prepare(HarvestConfig(**given), None, "cpu")
    assert prepare(HarvestConfig(**given, tokens="all"), None, "cpu").min_contexts == 1


@pytest.mark.parametrize(
    ("done", "span", "expected"),
    [
        ([], range(3), [range(3)]),
        ([0, 1, 2], range(3), []),
        ([1, 4, 5, 9], range(2, 8), [range(2, 4), range(6, 8)]),
        ([0, 2], range(1 << 40), [range(1, 2), range(3, 1 << 40)]),
        ([3], range(0), []),
    ],
)
def test_shards_that_are_missing_come_as_runs(
    done: list[int], span: range, expected: list[range]
) -> None:
    assert missing(done, span) == expected
    assert runs([n for run in expected if run.stop < 99 for n in run]) == [
        run for run in expected if run.stop < 99
    ]
