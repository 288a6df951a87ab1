"""The loader, integrity on, against the same loop over one np.memmap and against the disk."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from bench.measurement import Measurement, alternate, seconds
from sae_harvest.store.commits import commit_shard
from sae_harvest.store.layout import Plan, SitePlan
from sae_harvest.store.loading.loader import ShuffledLoader
from sae_harvest.store.objects import LocalObjects
from sae_harvest.store.reader import ActivationStore
from sae_harvest.store.rules import RowRule
from sae_harvest.store.seals import seal
from sae_harvest.store.tables import DOCUMENT_SCHEMA, PIECE_SCHEMA
from sae_harvest.store.writer import Shard, create_store, write_shard

SHARDS = 8  # so that taking two windows of memory is a small part of reading them
SITE = SitePlan(name="resid_post.12", width=576)
BATCH_ROWS = 4096
WINDOW_CHUNKS = 16
REPEATS = 5
ALL = RowRule(split="all", max_norm_medians=None)


def measure(folder: Path) -> list[Measurement]:
    """loader_warm and loader_cold, one epoch of a store of random numbers at a time."""
    store = _make_store(folder / "random")
    site = SITE.name
    shards = sorted((folder / "random" / "activations" / site).glob("c.*"))
    flat = folder / "flat.bin"
    rows = store.n_rows // BATCH_ROWS * BATCH_ROWS
    with flat.open("wb") as file:
        for shard in range(store.n_shards):
            store.read(site, *store.shard_span(shard)).tofile(file)

    def ours() -> float:
        loader = ShuffledLoader(store, site, BATCH_ROWS, 0, ALL, WINDOW_CHUNKS)
        taken = seconds(loader.next_batch, loader.batches_per_epoch)
        loader.close()
        return rows / taken

    def memmap() -> float:
        x = np.memmap(flat, store.dtype, "r").reshape(-1, SITE.width)
        return rows / seconds(lambda: _memmap_epoch(x, store.chunk_rows(site)))

    def sequential() -> float:
        return rows / seconds(lambda: read_through(shards))

    ours(), memmap()
    warm, warm_limit = alternate(ours, memmap, REPEATS)
    files = [*shards, flat]
    cool, cool_limit = alternate(cold(files, ours), cold(files, sequential), REPEATS)
    flat.unlink()
    shutil.rmtree(folder / "random")
    return [
        Measurement("loader_warm", warm, warm_limit, "rows/s", 0.5, 0.25, higher_is_better=True),
        Measurement("loader_cold", cool, cool_limit, "rows/s", 0.9, 0.6, higher_is_better=True),
    ]


def _make_store(place: Path) -> ActivationStore:
    """Shards of the size that a harvest of SmolLM2-135M makes, without documents."""
    plan = Plan(
        model={"name": "none", "weights": "none"},
        tokenizer={},
        corpus={"name": "none"},
        sites=(SITE,),
        context_length=128,
        contexts_per_shard=512,
        bos="none",
        seed=0,
        window_contexts=1,
        document_text=False,
        dtype="float16",
        compute_dtype="float32",
        batch_contexts=1,
    )
    objects = LocalObjects(place)
    create_store(objects, plan, {})
    x = np.random.default_rng(0).standard_normal((plan.shard_rows, SITE.width), np.float32)
    x, norms = x.astype(np.float16), np.linalg.norm(x, axis=1)
    tokens = np.zeros((plan.contexts_per_shard, plan.context_length), np.int32)
    pieces, documents = PIECE_SCHEMA.empty_table(), DOCUMENT_SCHEMA.empty_table()
    for number in range(SHARDS):
        shard = Shard(number, tokens, pieces, documents, {SITE.name: x}, {SITE.name: norms})
        commit_shard(objects, write_shard(objects, plan, shard))
    seal(objects, plan, SHARDS)
    return ActivationStore.open(place)


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
