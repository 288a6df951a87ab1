"""More tokens than before make a store longer; what it was stays what it was."""

from __future__ import annotations

import random
import shutil
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr

from sae_harvest.common.errors import RunError
from sae_harvest.store.reader import ActivationStore
from sae_harvest.train.config import TrainConfig
from sae_harvest.train.run.trainer import open_store, train
from tests.commands import commits, digest_of, invoke, options, refusal, wait_for
from tests.forked import forked
from tests.synthetic import make_plan, make_store
from tests.test_crash import reached
from tests.test_faults import assert_nothing_wrong, assert_whole

SITE = "resid_post.1"
ALL_TOKENS = 28_672  # whole contexts of 32 in the fixture corpus


def inodes(path: Path) -> dict[str, tuple[int, int]]:
    """Key → inode and time of change of every object, but for what a new seal brings up to date."""
    found = [p for p in path.rglob("*") if p.is_file() and p.name != "zarr.json"]
    return {str(p.relative_to(path)): (p.stat().st_ino, p.stat().st_mtime_ns) for p in found}


@pytest.fixture
def small(tmp_path: Path, model_folder: Path, corpus_file: Path) -> Path:
    """A store of the first 3 of the 8 shards of the fixture store."""
    path = tmp_path / "store"
    digest_of(invoke(*options(model_folder, corpus_file, path, tokens=3000)))
    return path


def test_a_grown_store_is_the_one_harvested_at_once(
    small: Path, model_folder: Path, corpus_file: Path, tiny_store: Path
) -> None:
    before, kept = ActivationStore.open(small), inodes(small)
    assert (before.n_shards, before.n_rows) == (3, 3072)
    for tokens in (4100, 8192):
        result = invoke(*options(model_folder, corpus_file, small, tokens=tokens))
        digest = digest_of(result)
    assert "8,192 rows of resid_post.1, 3,072 of them now" in result.stdout
    assert digest == ActivationStore.open(tiny_store).digest
    assert_whole(small, digest)
    assert kept.items() <= inodes(small).items()  # nothing was written twice
    assert sorted(p.stem for p in small.glob("seals/*")) == ["000003", "000005", "000008"]

    group: Any = zarr.open_group(str(small), mode="r")
    grown = ActivationStore.open(small)
    assert group[f"activations/{SITE}"].shape == (8192, 32)
    assert group["tokens"].shape == (256, 32)
    assert np.array_equal(group[f"activations/{SITE}"][:], grown.read(SITE, 0, 8192))
    earlier = ActivationStore.open(small, before.digest)
    assert (earlier.n_rows, earlier.digest) == (3072, before.digest)
    assert np.array_equal(earlier.read(SITE, 0, 3072), grown.read(SITE, 0, 3072))


def test_fewer_tokens_answer_with_the_smaller_store_and_lose_nothing(
    small: Path, tmp_path: Path, model_folder: Path, corpus_file: Path, tiny_store: Path
) -> None:
    path = Path(shutil.copytree(tiny_store, tmp_path / "large"))
    whole, kept = ActivationStore.open(path).digest, inodes(path)
    shapes = {p: p.read_bytes() for p in path.rglob("zarr.json")}
    result = invoke(*options(model_folder, corpus_file, path, tokens=3000))
    assert "3,072 rows of resid_post.1, 0 of them now." in result.stdout
    assert digest_of(result) == ActivationStore.open(small).digest
    assert kept.items() <= inodes(path).items()
    assert {p: p.read_bytes() for p in path.rglob("zarr.json")} == shapes
    assert_whole(path, whole)


@pytest.mark.slow
def test_a_harvest_killed_while_it_makes_a_store_longer_leaves_the_store(
    small: Path, model_folder: Path, corpus_file: Path, tiny_store: Path
) -> None:
    before = ActivationStore.open(small).digest
    arguments = options(model_folder, corpus_file, small, tokens=8192)
    rng = random.Random(1)
    for _ in range(2):
        with forked("harvest", *arguments) as process:
            assert wait_for(partial(reached, small, commits(small) + 1))
            time.sleep(rng.uniform(0, 0.01))
            process.kill()
        assert_nothing_wrong(small)
        if commits(small) < 8:
            assert ActivationStore.open(small).digest == before
    assert digest_of(invoke(*arguments)) == ActivationStore.open(tiny_store).digest
    assert_whole(small, ActivationStore.open(tiny_store).digest)


def test_a_store_that_ends_with_its_corpus_says_so_and_stays(
    tmp_path: Path, model_folder: Path, corpus_file: Path
) -> None:
    path = tmp_path / "store"
    shard = {"shard_rows": 5120}  # five of them and one of 3,072 rows
    run = partial(options, model_folder, corpus_file, path, **shard)
    first = digest_of(invoke(*run(tokens=20_000)))
    result = invoke(*run(tokens=26_000))  # within the short last shard
    digest = digest_of(result)
    assert (
        f"{ALL_TOKENS:,} rows of resid_post.1, {ALL_TOKENS - 20_480:,} of them now" in result.stdout
    )
    for tokens in (26_000, ALL_TOKENS):
        again = invoke(*run(tokens=tokens))
        assert digest_of(again) == digest
        assert "0 of them now" in again.stdout
    message = refusal(invoke(*run(tokens=ALL_TOKENS + 1)))
    assert f"holds {ALL_TOKENS:,} tokens" in message
    assert f"use --tokens {ALL_TOKENS}" in message
    assert_whole(path, digest)
    assert ActivationStore.open(path, first).n_rows == 20_480
    at_once = tmp_path / "at-once"
    same = options(model_folder, corpus_file, at_once, tokens=ALL_TOKENS, **shard)
    assert digest_of(invoke(*same)) == digest


def test_shards_that_nobody_was_to_do_leave_a_store_unsealed(
    tmp_path: Path, model_folder: Path, corpus_file: Path, tiny_store: Path
) -> None:
    path = tmp_path / "store"
    arguments = options(model_folder, corpus_file, path, tokens=8192)
    for part, n_done in (("100:200", 0), ("4:6", 2), ("4:7", 3)):
        result = invoke(*arguments, "--shards", part)
        assert "Not sealed" in result.stdout, (result.stdout, result.stderr, result.exception)
        assert commits(path) == n_done
        assert_nothing_wrong(path)
    digest = digest_of(invoke(*arguments))
    assert digest == ActivationStore.open(tiny_store).digest


def test_training_begun_before_a_store_grew_goes_on_with_what_it_began_with(
    tmp_path: Path,
) -> None:
    place, out, plan = tmp_path / "store", tmp_path / "sae", make_plan()
    make_store(place, plan, 40)
    store = ActivationStore.open(place)
    config = TrainConfig(n_latents=16, k=2, batch_rows=64, tokens=64 * 20, seed=0)
    train(config, place, out, device="cpu")
    make_store(place, plan, 100)
    assert ActivationStore.open(place).n_rows == 1600
    opened = open_store(place, out)
    assert (opened.digest, opened.n_rows) == (store.digest, 640)
    train(config, place, out, device="cpu")  # finished: nothing left to do, and not refused
    assert open_store(place, tmp_path / "another").n_rows == 1600
    make_store(tmp_path / "other", make_plan(seed=4), 40)
    with pytest.raises(RunError, match="store_digest"):
        train(config, tmp_path / "other", out, device="cpu")
