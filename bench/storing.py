"""Writing a shard through the whole protocol against one raw file with the same bytes."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np

from bench.measurement import Measurement, alternate, seconds
from sae_harvest.store.commits import commit_shard
from sae_harvest.store.objects import LocalObjects
from sae_harvest.store.reader import ActivationStore
from sae_harvest.store.writer import Shard, create_store, write_shard

REPEATS = 5


def measure(folder: Path) -> list[Measurement]:
    """shard_write, on the first shard of the store in `folder`."""
    store = ActivationStore.open(folder / "store")
    site = store.sites[0]
    first, last = store.shard_span(0)
    x, norms = store.read(site, first, last), store.norms(site, first, last)
    tokens = store.tokens(0, (last - first) // store.context_length)
    shard = Shard(0, tokens, store.pieces(0), store.documents(0), {site: x}, {site: norms})
    root, raw = folder / "written", folder / "raw"
    plan = store._plan

    def ours() -> float:
        shutil.rmtree(root, ignore_errors=True)
        objects = LocalObjects(root)
        create_store(objects, plan, {})
        os.sync()
        return seconds(lambda: commit_shard(objects, write_shard(objects, plan, shard)))

    data = np.ascontiguousarray(x).view(np.uint8).reshape(-1)

    def limit() -> float:
        raw.unlink(missing_ok=True)
        os.sync()
        return seconds(lambda: _write_and_sync(raw, data))

    taken, bare = alternate(ours, limit, REPEATS)
    shutil.rmtree(root)
    raw.unlink()
    rate = data.nbytes / 1e9
    return [
        Measurement(
            "shard_write", rate / taken, rate / bare, "GB/s", 0.9, 0.6, higher_is_better=True
        )
    ]


def _write_and_sync(path: Path, data: np.ndarray) -> None:
    with path.open("wb", buffering=0) as file:
        view = data.data
        while view:
            view = view[file.write(view) :]
        os.fsync(file.fileno())
