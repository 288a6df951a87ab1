"""A bit flipped anywhere in a store: `verify` names it, and no reader takes it for data."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sae_harvest.common.errors import DamagedError, SaeHarvestError
from sae_harvest.store import layout
from sae_harvest.store.maintenance.verify import verify
from sae_harvest.store.objects import LocalObjects
from sae_harvest.store.reader import ActivationStore
from sae_harvest.store.records import encode_record
from tests.commands import invoke
from tests.faulty_disk import sentence_of
from tests.synthetic import SITE, make_plan, make_store

FLIPS = 200
STORES = [("float16", 28), ("int8", 20)]  # 4 and 3 shards, the last one short; sealed twice

pytestmark = pytest.mark.usefixtures("unflushed")

Value = Any
Readings = dict[str, Callable[[ActivationStore], Value]]

READINGS: Readings = {
    "rows": lambda store: store.read(SITE, 0, store.n_rows),
    "norms": lambda store: store.norms(SITE, 0, store.n_rows),
    "tokens": lambda store: store.tokens(0, store.n_contexts),
    "contexts": lambda store: [store.pieces(u) for u in range(store.n_shards)],
    "documents": lambda store: [store.documents(u) for u in range(store.n_shards)],
    "medians": lambda store: [store.norm_median(SITE, u) for u in range(store.n_shards)],
    "statistics": lambda store: moments(store.statistics(SITE)),
    "identity": lambda store: (store.digest, store.plan, store.n_rows, store.n_bytes),
}


def moments(statistics: dict[str, Any]) -> Value:
    found = dict(statistics)
    for group in ("ordinary", "outlier", "all"):
        found[group] = found[group].to_json()
    return found


def same(a: Value, b: Value) -> bool:
    if isinstance(a, np.ndarray):
        return a.dtype == b.dtype and np.array_equal(a.view(np.uint8), b.view(np.uint8))
    return a == b


def positions(root: Path, seed: int) -> Iterator[tuple[Path, int, int]]:
    """File, byte and bit of every flip: each file twice, the others by size."""
    files = sorted(path for path in root.rglob("*") if path.is_file())
    rng = np.random.default_rng(seed)
    sizes = np.array([path.stat().st_size for path in files])
    weighted = rng.choice(len(files), FLIPS - 2 * len(files), p=sizes / sizes.sum())
    for number in [*range(len(files)), *range(len(files)), *weighted]:
        yield files[number], int(rng.integers(sizes[number])), int(rng.integers(8))


def readable(root: Path, digest: str | None) -> Iterator[tuple[str, Value]]:
    """Every reading that is not refused."""
    try:
        store = ActivationStore.open(root, digest)
    except SaeHarvestError as error:
        sentence_of(error)
        return
    for name, read in READINGS.items():
        try:
            yield name, read(store)
        except SaeHarvestError as error:
            sentence_of(error)


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "n_contexts"), STORES)
def test_a_flipped_bit_is_found_200_times_of_200_and_never_read(
    tmp_path: Path, dtype: str, n_contexts: int
) -> None:
    root = tmp_path / "s"
    objects, plan = LocalObjects(root), make_plan(dtype=dtype)
    make_store(objects, plan, 8)
    earlier = ActivationStore.open(root).digest
    make_store(objects, plan, n_contexts)
    objects.publish(layout.STATUS_KEY, [encode_record({"pid": 1, "shards": [3, 4]})])
    store = ActivationStore.open(root)
    whole = {name: read(store) for name, read in READINGS.items()}
    names = [str(path.relative_to(root)) for path, _, _ in positions(root, 1)]
    assert len(names) == FLIPS
    assert {"plan.json", "status.json", "zarr.json", "seals/000001.json"} < set(names)

    found = 0
    for number, (path, byte, bit) in enumerate(positions(root, 1)):
        key = path.relative_to(root).as_posix()
        data = bytearray(path.read_bytes())
        data[byte] ^= 1 << bit
        path.write_bytes(data)
        if key == layout.PLAN_KEY:
            with pytest.raises(DamagedError, match=r"plan\.json"):
                verify(objects, lambda done, total: None)
            found += 1
        else:
            damage = verify(objects, lambda done, total: None).damage
            assert [item.key for item in damage] == [key], (key, byte, bit)
            assert all(key in item.sentence for item in damage)
            found += 1
        for name, value in readable(root, None):
            assert same(value, whole[name]), (name, key, byte, bit)
        for name, value in readable(root, earlier) if number % 4 == 0 else ():
            if name == "rows":
                assert same(value, whole[name][: 8 * 16]), (name, key, byte, bit)
        data[byte] ^= 1 << bit
        path.write_bytes(data)
    assert found == FLIPS
    assert verify(objects, lambda done, total: None).damage == []


@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_a_reader_refuses_each_object_it_needs_when_it_is_altered_cut_or_gone(
    tmp_path: Path, dtype: str
) -> None:
    root = tmp_path / "s"
    make_store(root, make_plan(dtype=dtype), 20)
    needed = {
        f"activations/{SITE}/c.1.0": "rows",
        f"norms/{SITE}/c.1": "norms",
        "tokens/c.1.0": "tokens",
        "contexts/000001.parquet": "contexts",
        "documents/000001.parquet": "documents",
        "commits/000001.json": "medians",
        "seals/000003.json": "statistics",
        "plan.json": "identity",
    }
    if dtype == "int8":
        needed |= {f"quantization/{SITE}/c.1.0.0": "rows", f"exact/{SITE}/000001.parquet": "rows"}
    for key, name in needed.items():
        path = root / key
        whole = path.read_bytes()
        altered = bytes([whole[0] ^ 1, *whole[1:]])
        for damaged in (altered, whole[:-5], whole[: len(whole) // 2], b"", None):
            path.unlink() if damaged is None else path.write_bytes(damaged)
            if damaged == whole[:-5] and key.startswith("activations/"):
                assert verify(LocalObjects(root), lambda done, total: None).damage
            else:
                with pytest.raises(SaeHarvestError, match=rf"{key}|none is sealed|holds no"):
                    READINGS[name](ActivationStore.open(root))
            path.write_bytes(whole)


def test_the_command_names_what_is_damaged_and_fails(tmp_path: Path) -> None:
    root = tmp_path / "s"
    make_store(root)
    assert invoke("verify", "--store", root).exit_code == 0
    path = root / "norms" / SITE / "c.4"
    data = bytearray(path.read_bytes())
    data[9] ^= 16
    path.write_bytes(data)
    (root / "contexts" / "000002.parquet").unlink()
    result = invoke("verify", "--store", root)
    assert result.exit_code == 1
    lines = result.stderr.strip().splitlines()
    assert f"{path} is altered: its hash is not the committed one." in lines
    assert f"{root}/contexts/000002.parquet is missing." in lines
    assert lines[-1].startswith(f"Error: {root} has 2 damaged objects, named above;")
