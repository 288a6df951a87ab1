"""A store as a dask array gives the numbers that its rows have, and no overflow."""

from __future__ import annotations

from pathlib import Path

import dask.array
import numpy as np
import pytest

from sae_harvest.common.errors import DamagedError, InputError
from sae_harvest.store.reader import ActivationStore
from tests.synthetic import SITE, make_plan, make_store


@pytest.mark.parametrize("dtype", ["float16", "float32", "int8"])
def test_rows_are_those_of_the_reader_in_float32(tmp_path: Path, dtype: str) -> None:
    make_store(tmp_path / "store", make_plan(dtype=dtype))
    store = ActivationStore.open(tmp_path / "store")
    lazy = ActivationStore.open(tmp_path / "store").dask()
    assert lazy.dtype == np.float32
    assert lazy.shape == (store.n_rows, store.width(SITE))
    wanted = np.asarray(store.read(SITE, 0, store.n_rows), np.float32)
    np.testing.assert_array_equal(lazy.compute(scheduler="threads"), wanted)
    np.testing.assert_array_equal(lazy[3:70:7, 2].compute(), wanted[3:70:7, 2])


def test_a_mean_that_overflows_in_float16_does_not_in_float32(
    tmp_path: Path, tiny_store: Path
) -> None:
    """8,192 rows of about 8 sum up to 65,536, which float16 cannot hold."""
    store = ActivationStore.open(tiny_store)
    site = store.sites[0]
    rows = np.asarray(store.read(site, 0, store.n_rows), np.float32)
    factor = 2 * 65_504 / np.abs(rows.sum(0)).max()
    plain = dask.array.from_zarr(str(tiny_store), component=f"activations/{site}")
    with np.errstate(over="ignore"):
        overflown = (plain * np.float16(factor)).mean(0).compute(scheduler="sync")
    assert not np.isfinite(overflown).all()
    mean = (ActivationStore.open(tiny_store).dask() * factor).mean(0).compute(scheduler="sync")
    np.testing.assert_allclose(mean, rows.mean(0) * factor, rtol=1e-4, atol=1e-4)


def test_damage_and_wrong_sites_are_named(tmp_path: Path) -> None:
    make_store(tmp_path / "store", make_plan())
    with pytest.raises(InputError, match="resid_post"):
        ActivationStore.open(tmp_path / "store").dask("mlp_out.1")
    lazy = ActivationStore.open(tmp_path / "store").dask()
    path = tmp_path / "store" / "activations" / SITE / "c.0.0"
    data = bytearray(path.read_bytes())
    data[5] ^= 1
    path.write_bytes(data)
    with pytest.raises(DamagedError, match=r"c\.0\.0"):
        lazy.compute(scheduler="sync")
