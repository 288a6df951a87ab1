"""The loader's promises: pure order, small state, each row once, loud on damage."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sae_harvest.common.errors import DamagedError, InputError, RunError
from sae_harvest.store.loading.loader import ShuffledLoader
from sae_harvest.store.objects import LocalObjects
from sae_harvest.store.reader import ActivationStore
from sae_harvest.store.rules import RowRule
from tests.synthetic import (
    OTHER,
    SITE,
    make_plan,
    make_store,
    make_two_sites,
    replace_array,
    rows_of,
)

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


def threads() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name.startswith("store-loader")]


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
    for _ in range(2 * loader.batches_per_epoch):
        batch = loader.next_batch()
        assert torch.equal(batch.x, expected[batch.rows])
        assert selected[batch.rows].all()
        assert batch.target is None
    loader.close()


def test_a_batch_is_the_callers_own(store: ActivationStore) -> None:
    loader = ShuffledLoader(store, SITE, 100, 0, ALL, 2)
    batches = [loader.next_batch() for _ in range(loader.batches_per_epoch)]
    loader.close()
    expected = torch.from_numpy(rows_of(store._plan).astype(np.float16)).float()
    for batch in batches:
        assert torch.equal(batch.x, expected[batch.rows])


def test_memory_of_a_batch_is_used_again_when_nothing_holds_it(store: ActivationStore) -> None:
    loader = ShuffledLoader(store, SITE, 100, 0, ALL, 2)
    held = loader.next_batch().x[3:5]  # a view holds all of it
    content, place = held.clone(), held.data_ptr()
    later = {loader.next_batch().x.data_ptr() for _ in range(20)}
    assert len(later) == 1
    assert place - 3 * held.stride(0) * held.itemsize not in later
    assert torch.equal(held, content)
    loader.close()


@pytest.mark.parametrize("dtype", ["int8", "float32"])
def test_rows_of_other_types_are_what_the_store_reads(tmp_path: Path, dtype: str) -> None:
    make_store(tmp_path / "s", make_plan(dtype=dtype))
    store = ActivationStore.open(tmp_path / "s")
    expected = store.read(SITE, 0, store.n_rows)
    loader = ShuffledLoader(store, SITE, 200, 0, ALL, 3)
    for batch, _ in zip(loader, range(2 * loader.batches_per_epoch), strict=False):
        assert np.array_equal(batch.x.numpy(), expected[batch.rows])
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


def test_resuming_reads_no_window_before_its_own(
    store: ActivationStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    loader = ShuffledLoader(store, SITE, 100, 0, ALL, 1)  # a chunk is a window
    batches = take(loader, loader.batches_per_epoch)
    read: list[int] = []
    original = ActivationStore.read

    def noting(self: ActivationStore, site: str, start: int, *rest: object) -> np.ndarray:
        read.append(start // 128)
        return original(self, site, start, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(ActivationStore, "read", noting)
    loader.load_state(loader.state() | {"epoch": 0, "step": 11})
    assert np.array_equal(take(loader, 1)[0], batches[11])
    assert 0 < len(read) <= 3  # two windows, and a third as soon as the first is consumed
    assert set(read) <= set(np.concatenate(batches[11:]) // 128)


def test_order_is_fixed_for_a_seed(store: ActivationStore) -> None:
    # Golden orders: a continued run reads on in the order of its beginning.
    golden = [1189, 1278, 1047, 1063, 1240, 0]
    loader = ShuffledLoader(store, SITE, 6, 0, ALL, 4)
    assert take(loader, 1)[0].tolist() == golden
    loader.load_state(loader.state() | {"epoch": 3, "step": 100})
    assert take(loader, 1)[0].tolist() == [617, 1040, 287, 610, 1068, 529]
    assert take(ShuffledLoader(store, SITE, 6, 1, ALL, 4), 1)[0].tolist() != golden


def test_a_state_of_another_order_is_refused_by_field(
    store: ActivationStore, tmp_path: Path
) -> None:
    """Whatever decides the order is in the state: a loader of another one refuses it."""
    make_two_sites(tmp_path / "two", shards=3)
    two = ActivationStore.open(tmp_path / "two")
    make_store(tmp_path / "other", make_plan(seed=1))
    other = ActivationStore.open(tmp_path / "other")
    fraction = RowRule(split="all", max_norm_medians=None, heldout_fraction=0.1)
    common: dict[str, Any] = {"batch_rows": 32, "seed": 0, "rule": ALL, "window_chunks": 2}
    state = ShuffledLoader(two, SITE, **common).state()
    assert state == json.loads(json.dumps(state))
    for field, loader in {
        "store_digest": ShuffledLoader(other, SITE, **common),
        "site": ShuffledLoader(two, OTHER, **common),
        "target_site": ShuffledLoader(two, SITE, target_site=OTHER, **common),
        "rule": ShuffledLoader(two, SITE, **common | {"rule": fraction}),
        "batch_rows": ShuffledLoader(two, SITE, **common | {"batch_rows": 16}),
        "window_chunks": ShuffledLoader(two, SITE, **common | {"window_chunks": 1}),
        "seed": ShuffledLoader(two, SITE, **common | {"seed": 1}),
    }.items():
        before = loader.state()
        with pytest.raises(RunError, match=rf"^The loader state has {field} .*the same {field}"):
            loader.load_state(state)
        assert loader.state() == before
        differing = [name for name in state if before[name] != state[name]]
        assert differing == [field]
    ShuffledLoader(two, SITE, **common).load_state(state)


def test_a_state_that_none_was_saved_as_is_refused(store: ActivationStore) -> None:
    loader = ShuffledLoader(store, SITE, 64, 0, ALL)
    state = loader.state()
    with pytest.raises(RunError, match=r"of version 1, and this software .* of version 2"):
        loader.load_state(state | {"version": 1})
    for step in (26, -1, "1", None, 1.0, True):
        with pytest.raises(RunError, match=r"is at batch .* an epoch has 25 batches"):
            loader.load_state(state | {"step": step})
    with pytest.raises(RunError, match=r"at batch 0 of epoch -1"):
        loader.load_state(state | {"epoch": -1})
    for damaged in (None, [], "state", {}):
        with pytest.raises(RunError, match="loader state"):
            loader.load_state(damaged)
    assert loader.state() == state


def test_what_cannot_be_read_is_refused(store: ActivationStore) -> None:
    with pytest.raises(
        InputError, match="s has 1,600 rows, fewer than one batch of 5,000; harvest"
    ):
        ShuffledLoader(store, SITE, 5000, 0, ALL)
    with pytest.raises(InputError, match="window of 0 chunks"):
        ShuffledLoader(store, SITE, 64, 0, ALL, 0)
    with pytest.raises(InputError, match=f"holds the sites {SITE}"):
        ShuffledLoader(store, SITE, 64, 0, ALL, target_site="mlp_out.0")


def test_too_few_rows_are_explained_by_the_rule(store: ActivationStore) -> None:
    def sentence(**fields: Any) -> str:
        with pytest.raises(InputError) as caught:
            ShuffledLoader(store, SITE, 1600, 0, RowRule(**fields))
        return str(caught.value)

    split = sentence(max_norm_medians=None, heldout_fraction=0.999)
    assert split.startswith("The rule (split train with heldout_fraction 0.999) reads ")
    assert " of the 1,600 rows of " in split
    assert split.endswith("use smaller batches or lower --heldout-fraction.")
    norms = sentence(split="all", max_norm_medians=0.01)
    assert norms.startswith("The rule (max_norm_medians 0.01) reads 0 of the 1,600 rows")
    assert norms.endswith("use smaller batches or raise --max-norm-medians.")
    both = sentence(split="heldout")
    assert both.startswith(
        "The rule (split heldout with heldout_fraction 0.05, max_norm_medians 5)"
    )
    assert both.endswith("raise --heldout-fraction or raise --max-norm-medians.")


def test_damage_reaches_the_consumer(tmp_path: Path) -> None:
    make_store(tmp_path / "s")
    path = tmp_path / "s" / f"activations/{SITE}/c.5.0"
    data = bytearray(path.read_bytes())
    data[77] ^= 4
    path.write_bytes(data)
    loader = ShuffledLoader(ActivationStore.open(tmp_path / "s"), SITE, 64, 0, ALL, 2)
    with pytest.raises(DamagedError, match=r"c\.5\.0 is altered"):
        take(loader, loader.batches_per_epoch)
    with pytest.raises(DamagedError, match=r"c\.5\.0 is altered"):  # and it stays so
        loader.next_batch()
    path.unlink()
    loader.close()
    with pytest.raises(DamagedError, match=r"c\.5\.0 is missing"):
        take(loader, loader.batches_per_epoch)
    assert threads()
    loader.close()
    assert not threads()


def test_rows_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    plan = make_plan()
    make_store(tmp_path / "s", plan)
    x = rows_of(plan)[3 * 128 : 4 * 128].astype(np.float16)
    x[16, 3], x[20, 5] = -np.inf, np.nan  # rows 400, massive, and 404
    objects = LocalObjects(tmp_path / "s")
    replace_array(objects, plan, f"activations/{SITE}", 3, x)
    store = ActivationStore.open(tmp_path / "s")
    everything = RowRule(split="all")  # but the massive ones
    for rule, row in ((ALL, 400), (everything, 404)):
        loader = ShuffledLoader(store, SITE, 64, 0, rule, 2)
        with pytest.raises(DamagedError, match=rf"{SITE} that are not finite, in row {row};"):
            take(loader, loader.batches_per_epoch)
        loader.close()
    x[20, 5] = 0
    replace_array(objects, plan, f"activations/{SITE}", 3, x)
    loader = ShuffledLoader(ActivationStore.open(tmp_path / "s"), SITE, 64, 0, everything, 2)
    assert len(take(loader, loader.batches_per_epoch)) == loader.n_selected // 64


def test_closing_ends_the_threads_and_reading_goes_on(store: ActivationStore) -> None:
    loader = ShuffledLoader(store, SITE, 64, 0, ALL, 2)
    expected = take(ShuffledLoader(store, SITE, 64, 0, ALL, 2), 4)
    for rows in expected:
        assert np.array_equal(loader.next_batch().rows, rows)
        assert threads()
        loader.close()
        assert not threads()
    loader.close()
