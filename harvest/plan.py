"""What a harvest would take, estimated before any of it is done."""

from __future__ import annotations

import time
from datetime import timedelta

import numpy as np

from harvest.config import HarvestConfig
from harvest.prepare import prepare
from harvest.run import bytes_per_row
from harvest.worker import ShardWorker
from store.device import choose_device

MEASURED_BATCHES = 3


def estimate(config: HarvestConfig, device: str) -> dict[str, str]:
    """Rows, bytes, shards and time of a harvest; the time from a short measured forward pass."""
    device = choose_device(device)
    prepared = prepare(config, None, device)
    n_rows = prepared.n_shards * prepared.fields["contexts_per_shard"] * config.context_length
    worker = ShardWorker(
        prepared.model, config.sites, prepared.fields["compute_dtype"], device, None
    )
    plan = prepared.plan(worker.widths())
    shape = (plan.batch_contexts, plan.context_length)
    vocabulary = plan.model["vocabulary"]
    ids = np.random.default_rng(0).integers(0, vocabulary, shape, dtype=np.int32)
    worker.activations(plan, ids)
    start = time.perf_counter()
    for _ in range(MEASURED_BATCHES):
        worker.activations(plan, ids)
    rate = MEASURED_BATCHES * ids.size / (time.perf_counter() - start)
    sites = {
        f"bytes of {s.name}": f"{s.width * n_rows * plan.itemsize:,} ({plan.dtype}, {s.width} wide)"
        for s in plan.sites
    }
    return {
        "model": f"{config.model}, {plan.compute_dtype} on {device}",
        "corpus": config.corpus.name,
        "rows": f"{n_rows:,} ({n_rows // plan.context_length:,} contexts of {plan.context_length})",
        "shards": f"{prepared.n_shards} of {plan.shard_rows:,} rows",
        **sites,
        "bytes in all": f"about {bytes_per_row(plan) * n_rows:,}",
        "forward pass": f"{rate:,.0f} tokens/s on this machine",
        "time": f"about {timedelta(seconds=round(n_rows / rate))} with one worker",
        "plan": plan.hash,
    }
