"""Estimates of rows, bytes and time of a harvest, before it starts."""

from __future__ import annotations

import time
from datetime import timedelta

import numpy as np

from sae_harvest.common.device import choose_device
from sae_harvest.harvest.run.config import HarvestConfig
from sae_harvest.harvest.run.driver import bytes_per_row
from sae_harvest.harvest.run.log import Notify
from sae_harvest.harvest.run.prepare import prepare
from sae_harvest.harvest.run.worker import ShardWorker
from sae_harvest.harvest.text.folders import left_out_sentence
from sae_harvest.store.layout import Plan

MEASURED_BATCHES = 3
MILLION = 1_000_000


def estimate(
    config: HarvestConfig, device: str, notify: Notify = lambda line: None
) -> dict[str, str]:
    """Estimate rows, bytes, shards and time of a harvest; time from a short measured forward pass.

    If the harvest takes the whole corpus, bytes and time are for a million rows. `notify` is called
    with a sentence about the parts of the corpus that are left out.
    """
    device = choose_device(device)
    prepared = prepare(config, None, device)
    if left_out := left_out_sentence(config.corpus.name, prepared.corpus.left_out):
        notify(left_out)
    dtype = prepared.settings.compute_dtype
    worker = ShardWorker(prepared.model, config.sites, dtype, device, None)
    plan = prepared.plan(worker.widths())
    shape = (plan.batch_contexts, plan.context_length)
    vocabulary = plan.model["vocabulary"]
    ids = np.random.default_rng(0).integers(0, vocabulary, shape, dtype=np.int32)
    worker.activations(plan, ids)
    start = time.perf_counter()
    for _ in range(MEASURED_BATCHES):
        worker.activations(plan, ids)
    rate = MEASURED_BATCHES * ids.size / (time.perf_counter() - start)
    head = {
        "model": f"{config.model}, {plan.compute_dtype} on {device}",
        "corpus": config.corpus.name,
    }
    length = plan.context_length
    if config.tokens == "all":
        return {
            **head,
            "rows": f"all that the corpus holds, in contexts of {length}; the figures are for "
            f"{MILLION:,} rows",
            "shards": f"{plan.shard_rows:,} rows each, fewer in the last",
            **_sizes(plan, MILLION, rate),
        }
    n_rows = prepared.n_shards * plan.shard_rows
    return {
        **head,
        "rows": f"{n_rows:,} ({n_rows // length:,} contexts of {length})",
        "shards": f"{prepared.n_shards} of {plan.shard_rows:,} rows",
        **_sizes(plan, n_rows, rate),
    }


def _sizes(plan: Plan, n_rows: int, rate: float) -> dict[str, str]:
    """Estimate bytes and time of `n_rows` rows."""
    sites = {
        f"bytes of {s.name}": f"{s.width * n_rows * plan.itemsize:,} ({plan.dtype}, {s.width} wide)"
        for s in plan.sites
    }
    return {
        **sites,
        "bytes in all": f"about {bytes_per_row(plan) * n_rows:,}",
        "forward pass": f"{rate:,.0f} tokens/s on this machine",
        "time": f"about {timedelta(seconds=round(n_rows / rate))} with one worker",
        "plan": plan.hash,
    }
