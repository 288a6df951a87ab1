"""An int8 store against the float16 store of the same rows: bytes, error, and an SAE from each.

The int8 store is written from the float16 one as a worker writes it.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from bench.measurement import Measurement
from sae_harvest.store.commits import commit_shard
from sae_harvest.store.layout import Plan
from sae_harvest.store.objects import LocalObjects
from sae_harvest.store.reader import ActivationStore
from sae_harvest.store.seals import seal
from sae_harvest.store.statistics.stats import quantization_fvu
from sae_harvest.store.writer import Shard, create_store, write_shard
from sae_harvest.train.config import TrainConfig
from sae_harvest.train.run.trainer import train

MAX_BYTES, MAX_MEDIAN_FVU, MAX_WORST_FVU, MAX_SAE_CHANGE = 0.52, 3e-4, 5e-3, 0.01
TRAINING = TrainConfig(n_latents=2304, k=32, tokens=786_432, batch_rows=4096)


def measure(folder: Path) -> list[Measurement]:
    """int8_bytes, the two errors, and int8_sae, on the store in `folder`."""
    exact = ActivationStore.open(folder / "store")
    (site,) = exact.sites
    root = folder / "int8"
    quantize(exact, root)
    small = ActivationStore.open(root)
    statistics = small.statistics(site)
    lost = quantization_fvu(statistics["quantization_error"], statistics["ordinary"])
    fvu = [_heldout_fvu(place, folder / f"sae-{place.name}") for place in (folder / "store", root)]
    return [
        Measurement(
            "int8_bytes",
            small.n_bytes / small.n_rows,
            exact.n_bytes / exact.n_rows,
            "bytes",
            0.51,
            MAX_BYTES,
            higher_is_better=False,
        ),
        Measurement(
            "int8_median_fvu",
            float(np.median(lost)),
            MAX_MEDIAN_FVU,
            "FVU",
            1.0,
            1.0,
            higher_is_better=False,
        ),
        Measurement(
            "int8_worst_fvu",
            float(lost.max()),
            MAX_WORST_FVU,
            "FVU",
            1.0,
            1.0,
            higher_is_better=False,
        ),
        Measurement(
            "int8_sae",
            fvu[1],
            fvu[0],
            "FVU",
            1.0,
            1 + MAX_SAE_CHANGE,
            higher_is_better=False,
        ),
    ]


def quantize(store: ActivationStore, root: Path) -> None:
    """Write the rows of a float16 store of one site again, as int8."""
    (site,) = store.sites
    plan = Plan.model_validate(store.plan | {"dtype": "int8"})
    objects = LocalObjects(root)
    create_store(objects, plan, {})
    length = store.context_length
    for number in range(store.n_shards):
        first, last = store.shard_span(number)
        shard = Shard(
            number=number,
            tokens=store.tokens(first // length, last // length),
            pieces=store.pieces(number),
            documents=store.documents(number),
            activations={site: store.read(site, first, last)},
            norms={site: store.norms(site, first, last)},
        )
        commit_shard(objects, write_shard(objects, plan, shard))
    seal(objects, plan, store.n_shards)


def _heldout_fvu(place: Path, out: Path) -> float:
    """Of an SAE trained on a store, on the held-out rows of the very same store."""
    evaluation = train(TRAINING, place, out).evaluation
    if evaluation is None:
        raise AssertionError("the training did not end")
    return float(evaluation["without_outliers"]["fvu"])
