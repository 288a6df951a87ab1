"""The forward pass of a store's plan: bare, and with what a worker does to its results.

    python -m bench.forward STORE

Prints one JSON object: `bare`, tokens/s of the same model, batches and dtype, stopped after the
same block, nothing kept; `captured`, tokens/s of a worker that also keeps the activations, cast,
and their norms, but writes nothing. They take turns. A process of its own, so that it can have the
memory settings that workers have.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch

from bench.measurement import alternate, seconds
from sae_harvest.common.memory import KEEP_MEMORY
from sae_harvest.harvest.model.discovery import probe
from sae_harvest.harvest.model.models import load_model, resolve_model
from sae_harvest.harvest.model.sites import Site
from sae_harvest.harvest.run.worker import ShardWorker
from sae_harvest.store.commits import read_plan
from sae_harvest.store.objects import open_objects

TURNS = 5
BATCHES = 4  # each turn


class _StopError(Exception):
    """Raised by the hook after the last block that is needed."""


def forward_rates(store: Path) -> tuple[float, float]:
    """Tokens/s, bare and captured, on this machine's processor."""
    printed = subprocess.run(
        [sys.executable, "-m", "bench.forward", store],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[1],
        env=os.environ | KEEP_MEMORY,
    ).stdout
    rates = json.loads(printed.splitlines()[-1])
    return rates["bare"], rates["captured"]


def main() -> None:
    plan = read_plan(open_objects(sys.argv[1]))
    resolved = resolve_model(plan.model["name"])
    sites = tuple(site.name for site in plan.sites)
    model = load_model(resolved, getattr(torch, plan.compute_dtype), "cpu")
    worker = ShardWorker(resolved, sites, plan.compute_dtype, "cpu", threads=None)
    last = max(Site.parse(site).layer for site in sites)
    blocks, _ = probe(model)

    def stop(*_: object) -> None:
        raise _StopError

    blocks[last].register_forward_hook(stop)
    shape = (BATCHES * plan.batch_contexts, plan.context_length)
    ids = np.random.default_rng(0).integers(0, 1000, shape, dtype=np.int32)
    batches = torch.from_numpy(ids.astype(np.int64)).split(plan.batch_contexts)

    def bare() -> None:
        with torch.inference_mode():
            for batch in batches:
                try:
                    model.base_model(input_ids=batch, use_cache=False)
                except _StopError:
                    continue
                raise AssertionError("the forward pass was not stopped")

    def captured() -> None:
        worker.activations(plan, ids)

    bare()
    captured()
    taken = alternate(lambda: seconds(bare), lambda: seconds(captured), TURNS)
    print(json.dumps({"bare": ids.size / taken[0], "captured": ids.size / taken[1]}))


if __name__ == "__main__":
    main()
