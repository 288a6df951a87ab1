"""The harvest against the bare truncated forward pass, on the packaged model and text."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import torch

from bench.measurement import Measurement, seconds
from harvest.config import HarvestConfig
from harvest.corpus import CorpusSpec
from harvest.discovery import probe
from harvest.models import load_model, resolve_model
from harvest.run import run
from store.layout import Plan

LAYER = 12
SITE = f"resid_post.{LAYER}"
TOKENS = 3 * 65_536
ROUNDS = 3
BARE_BATCHES = 16  # before and after each harvest


class _StopError(Exception):
    """Raised by the hook after the last block that is needed."""


def bare_forward(plan: Plan, model_name: str) -> Callable[[], float]:
    """Tokens/s of the same model, batches and dtype, stopped after the same block, nothing kept."""
    dtype: torch.dtype = getattr(torch, plan.compute_dtype)
    model = load_model(resolve_model(model_name), dtype, "cpu")
    blocks, _ = probe(model)

    def stop(*_: object) -> None:
        raise _StopError

    blocks[LAYER].register_forward_hook(stop)
    shape = (plan.batch_contexts, plan.context_length)
    ids = torch.randint(0, 1000, shape, generator=torch.Generator().manual_seed(0))

    def forward() -> None:
        with torch.inference_mode():
            try:
                model.base_model(input_ids=ids, use_cache=False)
            except _StopError:
                return
        raise AssertionError("the forward pass was not stopped")

    forward()
    return lambda: BARE_BATCHES * ids.numel() / seconds(forward, BARE_BATCHES)


def measure(folder: Path) -> list[Measurement]:
    """harvest_efficiency and bytes_per_row; leaves its last store in `folder`."""
    config = HarvestConfig(
        model="smollm2-135m", corpus=CorpusSpec(name="news"), sites=(SITE,), tokens=TOKENS
    )
    # A first small harvest tells the batch shape; it also converts the model if need be.
    warm = run(config.model_copy(update={"tokens": 4096}), folder / "warm", workers=0)
    bare = bare_forward(warm.plan, config.model)
    limits, rates = [bare()], []
    for _ in range(ROUNDS):
        shutil.rmtree(folder / "store", ignore_errors=True)
        result = run(config, folder / "store", workers=1)
        rates.append(result.rows_run / result.seconds)
        limits.append(bare())
    # Each harvest against the bare passes on either side of it.
    around = [(a + b) / 2 for a, b in pairwise(limits)]
    middle = sorted(range(ROUNDS), key=lambda i: rates[i] / around[i])[ROUNDS // 2]
    stored = sum(p.stat().st_size for p in (folder / "store").rglob("*") if p.is_file())
    width = result.plan.width(SITE)
    return [
        Measurement(
            "harvest_efficiency",
            rates[middle],
            around[middle],
            "tokens/s",
            0.97,
            0.90,
            higher_is_better=True,
        ),
        Measurement(
            "bytes_per_row",
            stored / result.plan.n_rows,
            width * 2,
            "bytes",
            1.005,
            1.01,
            higher_is_better=False,
        ),
    ]
