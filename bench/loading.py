"""The loader, integrity on, against the same loop over one np.memmap and against the disk."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from bench.measurement import Measurement, alternate, seconds
from store.loader import ShuffledLoader
from store.reader import ActivationStore
from store.rules import RowRule

BATCH_ROWS = 4096
WINDOW_CHUNKS = 16
REPEATS = 5
ALL = RowRule(split="all", max_norm_medians=None)


def measure(folder: Path) -> list[Measurement]:
    """loader_warm and loader_cold, one epoch of the store in `folder` at a time."""
    store = ActivationStore.open(folder / "store")
    site = store.sites[0]
    shards = sorted((folder / "store" / "activations" / site).glob("c.*"))
    flat = folder / "flat.bin"
    rows = store.n_rows // BATCH_ROWS * BATCH_ROWS
    store.read(site, 0, store.n_rows).tofile(flat)

    def ours() -> float:
        loader = ShuffledLoader(store, site, BATCH_ROWS, 0, ALL, WINDOW_CHUNKS)
        taken = seconds(loader.next_batch, loader.batches_per_epoch)
        loader.close()
        return rows / taken

    width, chunk = store.width(site), store.chunk_rows(site)
    dtype = np.dtype(store.plan["dtype"])

    def memmap() -> float:
        x = np.memmap(flat, dtype, "r").reshape(-1, width)
        return rows / seconds(lambda: _memmap_epoch(x, chunk))

    def sequential() -> float:
        return rows / seconds(lambda: read_through(shards))

    ours(), memmap()
    warm, warm_limit = alternate(ours, memmap, REPEATS)
    files = [*shards, flat]
    cool, cool_limit = alternate(cold(files, ours), cold(files, sequential), REPEATS)
    flat.unlink()
    return [
        Measurement("loader_warm", warm, warm_limit, "rows/s", 0.5, 0.25, higher_is_better=True),
        Measurement("loader_cold", cool, cool_limit, "rows/s", 0.9, 0.6, higher_is_better=True),
    ]


def _memmap_epoch(x: np.ndarray, chunk: int) -> None:
    """The loader's loop with nothing checked: chunks in random order, rows permuted in windows."""
    rng = np.random.default_rng(0)
    order = rng.permutation(len(x) // chunk)
    for first in range(0, len(order), WINDOW_CHUNKS):
        chunks = order[first : first + WINDOW_CHUNKS]
        window = np.concatenate([x[c * chunk : (c + 1) * chunk] for c in chunks])
        rows = torch.from_numpy(rng.permutation(len(window)))
        resident = torch.from_numpy(window)
        for low in range(0, len(window), BATCH_ROWS):
            resident[rows[low : low + BATCH_ROWS]].float()


def cold(files: list[Path], call: Callable[[], float]) -> Callable[[], float]:
    """The call, with the files dropped from the system's cache before each."""

    def timed() -> float:
        os.sync()
        for path in files:
            _drop_from_cache(path)
        return call()

    return timed


def _drop_from_cache(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)


def read_through(paths: list[Path]) -> None:
    """Read files to their ends, one after the other, and keep nothing."""
    buffer = bytearray(8 << 20)
    for path in paths:
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass
