"""How well a loader's window mixes: how many rows of a batch come from the same text.

python -m bench.mixing STORE     prints the table of docs/loader.md for a store
"""

from __future__ import annotations

import sys

import numpy as np
import numpy.typing as npt
from rich.table import Table

from sae_harvest.common.console import output
from sae_harvest.store.loading.loader import ShuffledLoader
from sae_harvest.store.reader import ActivationStore
from sae_harvest.store.rules import RowRule

BATCH_ROWS = 4096
WINDOWS = (4, 16, 64)  # chunks; the whole store is added
RULE = RowRule()


def companions(groups: npt.NDArray[np.int64]) -> float:
    """How many others of its group a row has, on average: groups int64 [batch]."""
    counts = np.unique(groups, return_counts=True)[1].astype(np.float64)
    return float((counts * (counts - 1)).sum() / counts.sum())


def measured(
    store: ActivationStore, site: str, window_chunks: int, groups: list[npt.NDArray[np.int64]]
) -> list[float]:
    """Companions of a row in its batch, over an epoch, for each way to group the store's rows."""
    loader = ShuffledLoader(store, site, BATCH_ROWS, 0, RULE, window_chunks)
    found = [
        [companions(group[batch.rows]) for group in groups]
        for batch, _ in zip(loader, range(loader.batches_per_epoch), strict=False)
    ]
    loader.close()
    return np.mean(found, 0).tolist()


def main(place: str) -> None:
    store = ActivationStore.open(place)
    site = store.sites[0]
    document = np.concatenate([store.row_documents(u)[0] for u in range(store.n_shards)])
    context = np.arange(store.n_rows) // store.context_length
    groups = [document, context]
    selected = store.selected(site, RULE)
    perfect = [
        companions(group[selected]) * (BATCH_ROWS - 1) / (selected.sum() - 1) for group in groups
    ]
    chunks = -(-store.n_rows // store.chunk_rows(site))
    table = Table(box=None)
    for column in ("window", "rows", "MB", "same document", "same context"):
        table.add_column(column, justify="right")
    row_bytes = store.width(site) * store.dtype.itemsize
    for window in sorted({*(w for w in WINDOWS if w < chunks), chunks}):
        rows = min(window * store.chunk_rows(site), store.n_rows)
        mixed = measured(store, site, window, groups)
        table.add_row(
            f"{window} chunks" if window < chunks else "all",
            f"{rows:,}",
            f"{2 * rows * row_bytes / 1e6:,.0f}",
            *(f"{value:.2f}" for value in mixed),
        )
    table.add_row("perfect shuffle", "", "", *(f"{value:.2f}" for value in perfect))
    output().print(
        f"{store.place}: {selected.sum():,} rows of {site} in batches of {BATCH_ROWS:,}; "
        "others of the same document and of the same context in a row's batch, two windows in MB"
    )
    output().print(table)


if __name__ == "__main__":
    main(sys.argv[1])
