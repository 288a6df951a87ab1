"""A store's rows as a lazy dask array that can be computed with.

Arrays that zarr and dask open directly are float16 or int8. A sum over float16 rows overflows at
65,504, so a mean over many rows becomes inf or NaN; int8 codes lack their scale.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from sae_harvest.store.reader import ActivationStore

if TYPE_CHECKING:
    import dask.array


def lazy_rows(store: ActivationStore, site: str | None = None) -> dask.array.Array:
    """Return the rows of a site as a lazy array; see `ActivationStore.dask`."""
    import dask.array

    site = store.site(site)
    whole, rest = divmod(store.n_rows, rows := store.chunk_rows(site))
    return dask.array.map_blocks(
        functools.partial(_block, store.place, store.digest, site),
        chunks=((rows,) * whole + (rest,) * bool(rest), (store.width(site),)),
        dtype=np.float32,
        meta=np.empty((0, 0), np.float32),
        name=f"{site}-{store.digest}",
    )


def _block(place: str, digest: str, site: str, block_info: Any = None) -> npt.NDArray[np.float32]:
    (start, stop), _ = block_info[None]["array-location"]
    rows = _opened(place, digest).read(site, start, stop)
    return np.asarray(rows, np.float32)


@functools.lru_cache(maxsize=8)
def _opened(place: str, digest: str) -> ActivationStore:
    """Return the store, opened once in each process that computes blocks of it."""
    return ActivationStore.open(place, digest)
