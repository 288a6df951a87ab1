"""The loader among processes, over two sites, in fixed memory, at places other than a disk."""

from __future__ import annotations

import threading
from collections.abc import Callable
from copy import copy
from itertools import cycle
from pathlib import Path
from typing import TypeVar

import numpy as np
import pytest
import torch

from sae_harvest.common.atomic import Buffer
from sae_harvest.common.errors import DamagedError, InputError
from sae_harvest.store import layout
from sae_harvest.store.loading.chunks import READS, SelectedRows
from sae_harvest.store.loading.loader import Batch, ShuffledLoader
from sae_harvest.store.loading.order import Order
from sae_harvest.store.objects import LocalObjects
from sae_harvest.store.reader import ActivationStore
from sae_harvest.store.rules import RowRule
from tests.synthetic import (
    OTHER,
    SITE,
    make_plan,
    make_store,
    make_two_sites,
    other_rows,
    rows_of,
)

ALL = RowRule(split="all", max_norm_medians=None)
SHARDS = 6
T = TypeVar("T")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> ActivationStore:
    root = tmp_path_factory.mktemp("ranks") / "s"
    make_store(root)
    return ActivationStore.open(root)


def take(loader: ShuffledLoader, n: int) -> list[Batch]:
    batches = [loader.next_batch() for _ in range(n)]
    loader.close()
    return batches


@pytest.mark.parametrize("window_chunks", [1, 3, 100])
@pytest.mark.parametrize("batch_rows", [8, 200, 1592])
def test_order_is_independent_of_world_size(
    store: ActivationStore, window_chunks: int, batch_rows: int
) -> None:
    rule = RowRule(heldout_fraction=0.2) if batch_rows == 200 else ALL
    arguments = (store, SITE, batch_rows, 5, rule, window_chunks)
    alone = ShuffledLoader(*arguments)
    n = alone.batches_per_epoch + 2
    expected = take(alone, n)
    for world in (2, 4, 8):
        parts = [
            take(ShuffledLoader(*arguments, rank=rank, world=world), n) for rank in range(world)
        ]
        for whole, *shares in zip(expected, *parts, strict=True):
            assert np.array_equal(whole.rows, np.concatenate([s.rows for s in shares]))
            assert torch.equal(whole.x, torch.cat([s.x for s in shares]))


def test_a_state_moves_between_worlds(store: ActivationStore) -> None:
    expected = take(ShuffledLoader(store, SITE, 200, 0, ALL, 2), 20)
    loader = ShuffledLoader(store, SITE, 200, 0, ALL, 2, rank=1, world=2)
    for step in range(12):
        state = loader.state()
        assert state["epoch"] * 8 + state["step"] == step
        for world, rank in ((1, 0), (4, 3), (8, 5)):
            other = ShuffledLoader(store, SITE, 200, 0, ALL, 2, rank=rank, world=world)
            other.load_state(state)
            share = 200 // world
            for whole, part in zip(expected[step:], take(other, 4), strict=False):
                assert np.array_equal(whole.rows[rank * share :][:share], part.rows)
        loader.next_batch()
    loader.close()


def test_a_batch_that_the_world_cannot_share_is_refused(store: ActivationStore) -> None:
    with pytest.raises(InputError, match="100 rows can't be divided among 8 processes"):
        ShuffledLoader(store, SITE, 100, 0, ALL, rank=0, world=8)
    with pytest.raises(InputError, match="There is no rank 2 of 2"):
        ShuffledLoader(store, SITE, 100, 0, ALL, rank=2, world=2)


@pytest.mark.parametrize("rule", [ALL, RowRule(heldout_fraction=0.3)])
def test_no_window_exceeds_the_memory_set_aside(store: ActivationStore, rule: RowRule) -> None:
    counts = SelectedRows(store, (SITE,), rule).counts
    for world in (1, 2, 8):
        for window_chunks in (1, 3, 5, 100):
            for rank in range(world):
                order = Order(counts, 0, window_chunks, 120, rank, world)
                windows = order.windows(0, 0)
                most = max(order.count(next(windows)[0]) for _ in range(50))
                assert most <= order.capacity
                window = np.sort(counts)[-window_chunks:].sum()
                assert order.capacity <= window / world + order.share


def test_memory_is_taken_once(store: ActivationStore, monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[int] = []
    original = SelectedRows.buffer

    def noting(self: SelectedRows, capacity: int) -> object:
        taken.append(capacity)
        return original(self, capacity)

    monkeypatch.setattr(SelectedRows, "buffer", noting)
    loader = ShuffledLoader(store, SITE, 64, 0, ALL, 2)
    take(loader, 4 * loader.batches_per_epoch)
    assert taken == [256, 256]


def test_resident_memory_stays_flat(tmp_path: Path) -> None:
    make_store(tmp_path / "s", make_plan(width=2048))  # 6.5 MB
    loader = ShuffledLoader(ActivationStore.open(tmp_path / "s"), SITE, 64, 0, ALL, 2)
    peaks = []
    for _ in range(6):
        sizes = [resident() for _ in range(loader.batches_per_epoch) if loader.next_batch()]
        peaks.append(max(sizes))
    loader.close()
    assert peaks[-1] - peaks[1] < 2e6, peaks


def resident() -> int:
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


@pytest.mark.parametrize("sites", [(SITE, OTHER), (OTHER, SITE)])
def test_targets_are_the_same_rows_of_the_other_site(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sites: tuple[str, str]
) -> None:
    monkeypatch.setattr(layout, "CHUNK_BYTES", 2048)
    make_two_sites(tmp_path / "s", SHARDS)
    store = ActivationStore.open(tmp_path / "s")
    assert (store.chunk_rows(SITE), store.chunk_rows(OTHER)) == (128, 32)
    rows = {SITE: rows_of(store._plan)[: store.n_rows]}
    rows[OTHER] = np.concatenate([other_rows(n) for n in range(SHARDS)])
    expected = {name: torch.from_numpy(x.astype(np.float16)).float() for name, x in rows.items()}
    rule = RowRule(split="all")
    loader = ShuffledLoader(store, sites[0], 48, 0, rule, 5, target_site=sites[1])
    assert loader.n_selected == store.n_rows * 14 / 16  # massive at one site or the other
    seen = take(loader, loader.batches_per_epoch)
    for batch in seen:
        assert batch.target is not None
        assert torch.equal(batch.x, expected[sites[0]][batch.rows])
        assert torch.equal(batch.target, expected[sites[1]][batch.rows])
        assert not set(batch.rows % 16) & {0, 5}
    assert len(np.unique(np.concatenate([b.rows for b in seen]))) == loader.n_selected


class Remote(LocalObjects):
    """A place that answers, in memory of its own, when as many requests as may be are under way."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.waiting = self.most = 0
        self._changed = threading.Condition()

    def read_range(
        self, key: str, start: int, length: int, into: memoryview | None = None
    ) -> Buffer:
        if threading.current_thread().name.startswith("store-loader"):
            with self._changed:
                self.waiting += 1
                self.most = max(self.most, self.waiting)
                self._changed.notify_all()
                self._changed.wait_for(lambda: self.most >= READS, timeout=30)
                self.waiting -= 1
        return super().read_range(key, start, length)


def test_a_few_requests_are_under_way_at_once(
    store: ActivationStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    places: list[Remote] = []

    def remote(place: str) -> Remote:
        places.append(Remote(Path(place)))
        return places[0]

    expected = take(ShuffledLoader(store, SITE, 100, 0, ALL, 4), 16)
    monkeypatch.setattr("sae_harvest.store.reader.open_objects", remote)
    loader = ShuffledLoader(ActivationStore.open(store.place), SITE, 100, 0, ALL, 4)
    for there, here in zip(take(loader, 16), expected, strict=True):
        assert torch.equal(there.x, here.x)
    assert places[0].most == READS


class PretendUpload:
    """`Upload` where there is no GPU: copies at once, into two buffers in turn."""

    def __init__(
        self, shapes: list[tuple[int, int]], dtype: torch.dtype, device: torch.device
    ) -> None:
        self._turns = cycle([[torch.empty(shape, dtype=dtype) for shape in shapes] for _ in "ab"])
        self._arrived: tuple[torch.Tensor, ...] = ()

    def send(self, fill: Callable[[tuple[torch.Tensor, ...]], T]) -> tuple[T, PretendUpload]:
        buffers = next(self._turns)
        filled = fill(tuple(buffers))
        sent = copy(self)
        sent._arrived = tuple(buffer.float() for buffer in buffers)
        return filled, sent

    def arrive(self) -> tuple[torch.Tensor, ...]:
        return self._arrived


@pytest.mark.parametrize("window_chunks", [1, 4])
def test_sending_ahead_changes_neither_batches_nor_states(
    store: ActivationStore, monkeypatch: pytest.MonkeyPatch, window_chunks: int
) -> None:
    monkeypatch.setattr("sae_harvest.store.loading.loader.Upload", PretendUpload)
    arguments = (store, SITE, 100, 0, ALL, window_chunks)
    here, there = ShuffledLoader(*arguments), ShuffledLoader(*arguments, device="cuda")
    for step in range(40):
        expected, batch = here.next_batch(), there.next_batch()
        assert np.array_equal(batch.rows, expected.rows)
        assert torch.equal(batch.x, expected.x)
        assert there.state() == here.state()
        if step % 7 == 0:
            there.load_state(here.state())
    here.close()
    there.close()


def test_damage_ahead_does_not_cost_a_batch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_store(tmp_path / "s")
    damaged = tmp_path / "s" / f"activations/{SITE}/c.5.0"
    damaged.write_bytes(damaged.read_bytes()[:-3000])
    monkeypatch.setattr("sae_harvest.store.loading.loader.Upload", PretendUpload)
    arguments = (ActivationStore.open(tmp_path / "s"), SITE, 32, 0, ALL, 2)
    steps = []
    for device in ("cpu", "cuda"):
        loader = ShuffledLoader(*arguments, device=device)
        with pytest.raises(DamagedError, match=r"c\.5\.0 is cut short"):
            take(loader, loader.batches_per_epoch)
        steps.append(loader.state()["step"])
        loader.close()
    assert steps[0] == steps[1] > 0
    assert steps[0] * 32 % 64 == 0  # to the end of the window before


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("window_chunks", [1, 4])
def test_batches_on_a_gpu_are_those_of_the_processor(
    store: ActivationStore, window_chunks: int
) -> None:
    arguments = (store, SITE, 100, 0, ALL, window_chunks)
    expected = take(ShuffledLoader(*arguments), 40)
    loader = ShuffledLoader(*arguments, device="cuda")
    state = loader.state()
    kept = []
    for here in expected:
        batch = loader.next_batch()
        assert batch.x.device.type == "cuda"
        assert np.array_equal(batch.rows, here.rows)
        kept.append(batch.x)  # what was given must outlive the buffers it came through
    for x, here in zip(kept, expected, strict=True):
        assert torch.equal(x.cpu(), here.x)
    loader.load_state(state)
    assert torch.equal(take(loader, 1)[0].x.cpu(), expected[0].x)
