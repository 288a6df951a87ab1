"""Shards of random tokens for the fixture model, and places where workers die."""

from __future__ import annotations

import os
import signal
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np

from sae_harvest.harvest.model.models import ResolvedModel, model_fingerprint, resolve_model
from sae_harvest.harvest.run.pool import Pool, open_pool
from sae_harvest.store.layout import Plan, SitePlan
from sae_harvest.store.objects import LocalObjects, Objects
from sae_harvest.store.tables import DOCUMENT_SCHEMA, PIECE_SCHEMA
from sae_harvest.store.writer import Shard

SITES = ("resid_post.1",)
LENGTH, CONTEXTS, WIDTH = 32, 8, 32


def make_plan(model: ResolvedModel, **changed: Any) -> Plan:
    """Shards of 256 rows of resid_post.1 of the fixture model, in batches of 96."""
    fields = {
        "model": model_fingerprint(model),
        "tokenizer": {},
        "corpus": {"name": "none"},
        "sites": (SitePlan(name=SITES[0], width=WIDTH),),
        "context_length": LENGTH,
        "contexts_per_shard": CONTEXTS,
        "bos": "none",
        "seed": 0,
        "window_contexts": 64,
        "document_text": False,
        "dtype": "float16",
        "compute_dtype": "float32",
        "batch_contexts": 3,
    }
    return Plan.model_validate(fields | changed)


def make_inputs(count: int) -> list[Shard]:
    """The first shards: random tokens of nowhere."""
    rng = np.random.default_rng(0)
    return [
        Shard(
            number=number,
            tokens=rng.integers(0, 400, (CONTEXTS, LENGTH), dtype=np.int32),
            pieces=PIECE_SCHEMA.empty_table(),
            documents=DOCUMENT_SCHEMA.empty_table(),
            cursor={"shard": number},
        )
        for number in range(count)
    ]


def local_model(folder: Path) -> ResolvedModel:
    return resolve_model(str(folder))


def deadly(folder: Path, shard: int, times: int) -> Objects:
    """A place that kills whoever publishes one shard's tokens, so many times.

    Its class travels to the workers by value: they cannot import the tests.
    """

    class DeadlyObjects(LocalObjects):
        def publish(self, key: str, pieces: Any) -> bool:
            if key == f"tokens/c.{shard}.0":
                killed = len(list(folder.glob("killed.*")))
                if killed < times:
                    (folder / f"killed.{killed}").touch()
                    os.kill(os.getpid(), signal.SIGKILL)
            return super().publish(key, pieces)

    folder.mkdir(parents=True, exist_ok=True)
    return DeadlyObjects(folder)


Records = dict[int, dict[str, Any]]


def opened_pool(
    folder: Path, workers: int, report: Any = print, address: str | None = None
) -> AbstractContextManager[Pool]:
    """Workers with the fixture model; 0 is this process."""
    return open_pool(workers, local_model(folder), SITES, "float32", "cpu", address, report)


def through_pool(pool: Pool, objects: Objects, plan: Plan, shards: list[Shard]) -> Records:
    """The record of every shard, handed out as the driver does it."""
    waiting, records = list(shards), {}
    while waiting or pool.in_flight():
        while waiting and len(pool.in_flight()) < pool.capacity:
            pool.submit(objects, plan, waiting.pop(0))
        for record in pool.collect():
            records[record["shard"]] = record
        pool.rows_done()
    return records
