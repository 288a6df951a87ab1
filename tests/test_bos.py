"""A BOS has no text of its own: it follows the text after it, and is told apart in evaluations."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

from sae_harvest.pipelines.features.tables.rows import Rows, for_scores, write_rows
from sae_harvest.store.commits import commit_shard
from sae_harvest.store.layout import Plan
from sae_harvest.store.loading.loader import ShuffledLoader
from sae_harvest.store.objects import LocalObjects
from sae_harvest.store.reader import ActivationStore
from sae_harvest.store.rules import RowRule, heldout_documents
from sae_harvest.store.seals import seal
from sae_harvest.store.writer import create_store, write_shard
from sae_harvest.train.config import TrainConfig
from sae_harvest.train.evaluate import evaluate
from sae_harvest.train.run.trainer import train
from sae_harvest.train.sae.sae import SAE
from tests.synthetic import SITE, make_plan, make_shard, make_store

WIDTH, LENGTH, SHARDS = 768, 16, 24
RULE = RowRule(heldout_fraction=0.3)
EVERY = RowRule(heldout_fraction=0.3, max_norm_medians=None)


def pieces_of(first: int, last: int, n_bos: int) -> pa.Table:
    """Two documents in each context, of which every second goes on in the next one."""
    rng = np.random.default_rng(first)
    contexts = np.repeat(np.arange(first, last), 2)
    cuts = rng.integers(n_bos + 1, LENGTH, last - first)
    starts = np.stack([np.full_like(cuts, n_bos), cuts], 1).ravel()
    stops = np.stack([cuts, np.full_like(cuts, LENGTH)], 1).ravel()
    documents = (np.arange(2 * first, 2 * last) + 1) // 2
    hashes = (documents.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    n = len(contexts)
    return pa.table(
        {
            "context": pa.array(contexts, pa.int64()),
            "start": pa.array(starts, pa.int32()),
            "stop": pa.array(stops, pa.int32()),
            "document": pa.array(documents, pa.int64()),
            "document_hash": pa.array(hashes, pa.uint64()),
            "first_token": pa.array(np.zeros(n), pa.int64()),
            "char_start": pa.array(np.zeros(n), pa.int64()),
            "char_end": pa.array(np.full(n, 50), pa.int64()),
        }
    )


def rows_of(plan: Plan, number: int) -> np.ndarray:
    """Rows of a shard, float32: every BOS is one and the same vector, of an ordinary norm."""
    x = np.random.default_rng(number).standard_normal((plan.shard_rows, WIDTH)).astype(np.float32)
    x[:, :8] *= 4
    x[5::LENGTH] *= 50  # outliers
    if plan.bos == "context":
        x[::LENGTH] = np.random.default_rng(99).standard_normal(WIDTH)
    return x


def make(place: Path, bos: str, shards: int = SHARDS) -> ActivationStore:
    """A store as wide as GPT-2."""
    plan = make_plan(width=WIDTH).model_copy(update={"bos": bos})
    objects = LocalObjects(place)
    create_store(objects, plan, {})
    for number in range(shards):
        x = rows_of(plan, number)
        first = number * plan.contexts_per_shard
        shard = replace(
            make_shard(plan, number, shards * plan.contexts_per_shard),
            pieces=pieces_of(first, first + plan.contexts_per_shard, int(bos == "context")),
            activations={SITE: x.astype(np.float16)},
            norms={SITE: np.linalg.norm(x, axis=1)},
        )
        commit_shard(objects, write_shard(objects, plan, shard))
    seal(objects, plan, shards)
    return ActivationStore.open(place)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> ActivationStore:
    return make(tmp_path_factory.mktemp("bos") / "store", "context")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, store: ActivationStore) -> Path:
    """An SAE trained on the store."""
    out = tmp_path_factory.mktemp("bos-run") / "sae"
    config = TrainConfig(n_latents=64, k=4, tokens=40 * 128, batch_rows=128, rule=RULE)
    train(config, store.place, out, device="cpu")
    return out


def by_context(store: ActivationStore, rows: np.ndarray) -> np.ndarray:
    return rows.reshape(-1, store.context_length)


def test_a_bos_has_the_hash_of_the_text_after_it(store: ActivationStore) -> None:
    parts = [np.stack(store.row_documents(shard)) for shard in range(store.n_shards)]
    documents, hashes = (by_context(store, part) for part in np.concatenate(parts, 1))
    assert (documents[:, 0] == -1).all()
    assert (documents[:, 1:] >= 0).all()
    assert np.array_equal(hashes[:, 0], hashes[:, 1])
    assert (hashes[:, 1] != hashes[:, -1]).all()  # the second document's is another


def test_no_split_takes_all_bos_rows_or_none(store: ActivationStore) -> None:
    hashes = np.concatenate([store.row_documents(shard)[1] for shard in range(store.n_shards)])
    heldout = by_context(store, store.selected(SITE, EVERY.model_copy(update={"split": "heldout"})))
    trained = by_context(store, store.selected(SITE, EVERY))
    scored = by_context(store, for_scores(hashes))
    for part, share in ((heldout, 0.3), (trained, 0.7), (scored, 0.5)):
        assert np.array_equal(part[:, 0], part[:, 1])
        assert abs(part[:, 0].mean() - share) < 0.15
    assert np.array_equal(heldout, ~trained)


def test_tables_split_bos_rows_as_their_text(store: ActivationStore, tmp_path: Path) -> None:
    def parts():
        for shard in range(store.n_shards):
            documents, hashes = store.row_documents(shard)
            read = store.selected_in_shard(SITE, RULE.model_copy(update={"split": "all"}), shard)
            yield np.zeros(len(documents), np.int32), documents, hashes, read

    write_rows(parts(), store.n_rows, tmp_path)
    rows = Rows(tmp_path)
    scores = by_context(store, rows.scores(np.arange(store.n_rows)))
    assert np.array_equal(scores[:, 0], scores[:, 1])
    assert 0.3 < scores[:, 0].mean() < 0.7
    assert (by_context(store, rows.document)[:, 0] == -1).all()


def test_training_reads_bos_rows_of_training_texts(store: ActivationStore) -> None:
    loader = ShuffledLoader(store, SITE, 128, 0, RULE)
    seen = np.concatenate([loader.next_batch().rows for _ in range(loader.batches_per_epoch)])
    loader.close()
    is_seen = by_context(store, np.isin(np.arange(store.n_rows), seen))
    first, second = np.flatnonzero(is_seen[:, 0]), np.flatnonzero(is_seen[:, 1])
    assert 0.5 * store.n_contexts < len(first) < 0.9 * store.n_contexts
    # but for the rows that are dropped at the end of an epoch
    assert len(np.setxor1d(first, second)) <= loader.n_selected % 128


def test_figures_are_given_with_and_without_bos_rows(store: ActivationStore, run: Path) -> None:
    sae = SAE.load(run)
    found = evaluate(sae, store, RULE, 10**6)
    x = torch.from_numpy(store.read(SITE, 0, store.n_rows)).float()
    got = sae.decode(*sae.encode(x), x).double()
    error = (got - x).square().sum(1)
    is_bos = np.arange(store.n_rows) % LENGTH == 0
    without = {"without_outliers": RULE, "with_outliers": EVERY}
    for name, rule in without.items():
        heldout = store.selected(SITE, rule.model_copy(update={"split": "heldout"}))
        for group, chosen in ((name, heldout), (f"{name}_without_bos", heldout & ~is_bos)):
            rows = x[chosen].double()
            fvu = error[chosen].sum() / (rows - rows.mean(0)).square().sum()
            assert found[group]["rows"] == chosen.sum() > 0
            assert found[group]["fvu"] == pytest.approx(fvu.item(), rel=1e-5)
        n_bos = found[name]["rows"] - found[f"{name}_without_bos"]["rows"]
        hashes = np.concatenate([store.row_documents(n)[1] for n in range(store.n_shards)])
        assert n_bos == heldout_documents(hashes[is_bos], 0.3).sum()
        assert 0 < n_bos < store.n_contexts / 2
    assert found["with_outliers"]["rows"] > found["without_outliers"]["rows"]


def test_a_store_without_bos_has_no_such_figures(run: Path, tmp_path: Path) -> None:
    plain = make(tmp_path / "plain", "none", shards=8)
    found = evaluate(SAE.load(run), plain, RULE, 1000)
    assert not [name for name in found if "bos" in name]
    heldout = by_context(plain, plain.selected(SITE, EVERY.model_copy(update={"split": "heldout"})))
    assert 0 < heldout[:, 0].mean() < 0.6


def test_a_whole_epoch_of_a_store_of_one_document_a_context(tmp_path: Path) -> None:
    """Without BOS, splits are what they were: by the text's hash alone."""
    make_store(tmp_path / "s")
    store = ActivationStore.open(tmp_path / "s")
    hashes = np.concatenate([store.row_documents(n)[1] for n in range(store.n_shards)])
    rule = RowRule(max_norm_medians=None, heldout_fraction=0.3, split="heldout")
    assert np.array_equal(store.selected(SITE, rule), heldout_documents(hashes, 0.3))
