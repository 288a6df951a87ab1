"""The loader's promises: pure order, small state, each row once, loud on damage."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from store.errors import DamagedError, InputError, RunError
from store.loader import ShuffledLoader
from store.reader import ActivationStore
from store.rules import RowRule
from tests.synthetic import SITE, make_store, rows_of

ALL = RowRule(split="all", max_norm_medians=None)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> ActivationStore:
    root = tmp_path_factory.mktemp("loader") / "s"
    make_store(root)
    return ActivationStore.open(root)


def take(loader: ShuffledLoader, n: int) -> list[np.ndarray]:
    rows = [loader.next_batch().rows for _ in range(n)]
    loader.close()
    return rows


@pytest.mark.parametrize("window_chunks", [1, 3, 100])
@pytest.mark.parametrize("batch_rows", [64, 100, 1599])
def test_each_row_once_an_epoch(
    store: ActivationStore, window_chunks: int, batch_rows: int
) -> None:
    loader = ShuffledLoader(store, SITE, batch_rows, 0, ALL, window_chunks)
    per_epoch = loader.batches_per_epoch
    assert per_epoch == store.n_rows // batch_rows
    batches = take(loader, 2 * per_epoch)
    for epoch in (batches[:per_epoch], batches[per_epoch:]):
        rows = np.concatenate(epoch)
        assert len(np.unique(rows)) == len(rows) == per_epoch * batch_rows
    assert not np.array_equal(batches[0], batches[per_epoch])


def test_batches_hold_the_rows_they_name(store: ActivationStore) -> None:
    expected = torch.from_numpy(rows_of(store._plan).astype(np.float16)).float()
    loader = ShuffledLoader(store, SITE, 50, 3, RowRule(heldout_fraction=0.2), 2)
    selected = store.selected(SITE, RowRule(heldout_fraction=0.2))
    assert loader.n_selected == selected.sum() < store.n_rows
    for _ in range(20):
        batch = loader.next_batch()
        assert torch.equal(batch.x, expected[batch.rows])
        assert selected[batch.rows].all()
    loader.close()


def test_restoring_at_every_step_gives_the_same_rest(store: ActivationStore) -> None:
    loader = ShuffledLoader(store, SITE, 130, 7, ALL, 2)
    n = 2 * loader.batches_per_epoch + 3
    states, rows = [loader.state()], []
    for _ in range(n):
        rows.append(loader.next_batch().rows)
        states.append(json.loads(json.dumps(loader.state())))
    loader.close()
    for step in range(n):
        again = ShuffledLoader(store, SITE, 130, 7, ALL, 2)
        again.load_state(states[step])
        for expected, got in zip(rows[step:], take(again, n - step), strict=True):
            assert np.array_equal(expected, got)


def test_order_is_fixed_for_a_seed(store: ActivationStore) -> None:
    # A golden order: a change of numpy's generators or of ours must not go unnoticed.
    first = take(ShuffledLoader(store, SITE, 6, 0, ALL, 4), 1)[0]
    golden = [1149, 1059, 828, 1054, 778, 1471]
    assert first.tolist() == golden
    assert take(ShuffledLoader(store, SITE, 6, 1, ALL, 4), 1)[0].tolist() != golden


def test_a_state_of_another_seed_or_store_is_refused(store: ActivationStore) -> None:
    loader = ShuffledLoader(store, SITE, 64, 0, ALL)
    with pytest.raises(RunError, match="seed 1, this run has 0"):
        loader.load_state(loader.state() | {"seed": 1})
    with pytest.raises(RunError, match="store_digest"):
        loader.load_state(loader.state() | {"store_digest": "0"})


def test_too_few_rows_for_a_batch(store: ActivationStore) -> None:
    with pytest.raises(InputError, match="fewer than one batch of 5,000"):
        ShuffledLoader(store, SITE, 5000, 0, ALL)


def test_damage_reaches_the_consumer(tmp_path: Path) -> None:
    make_store(tmp_path / "s")
    path = tmp_path / "s" / f"activations/{SITE}/c.5.0"
    data = bytearray(path.read_bytes())
    data[77] ^= 4
    path.write_bytes(data)
    loader = ShuffledLoader(ActivationStore.open(tmp_path / "s"), SITE, 64, 0, ALL, 2)
    with pytest.raises(DamagedError, match=r"c\.5\.0"):
        take(loader, loader.batches_per_epoch)
    loader.close()
