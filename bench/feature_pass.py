"""The feature pass against encoding the same rows and keeping nothing."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from bench.measurement import Measurement, alternate, seconds
from pipelines.features.accumulate import Accumulator
from pipelines.features.build import accumulate
from pipelines.features.config import FeatureConfig
from pipelines.features.neighbours import decoder_neighbours
from store.reader import ActivationStore
from store.rules import RowRule
from train.config import SAEConfig
from train.sae import SAE

N_LATENTS, K = 24_576, 32
REPEATS = 3
RULE = RowRule(split="all")


def measure(folder: Path) -> list[Measurement]:
    """feature_pass, over the store in `folder`, with a random dictionary of 24,576 latents."""
    store = ActivationStore.open(folder / "store")
    site = store.sites[0]
    sae = random_sae(store, site)
    config = FeatureConfig()
    neighbours, _ = decoder_neighbours(sae.W_dec, config.n_neighbours)

    def whole() -> float:
        counts = Accumulator(N_LATENTS, store.context_length, neighbours, config)
        return seconds(lambda: accumulate(store, site, sae, RULE, config, counts))

    def encode() -> float:
        return seconds(lambda: _encode_all(store, site, sae, config.batch_rows))

    whole(), encode()  # compiles
    taken, limit = alternate(whole, encode, REPEATS)
    return [Measurement("feature_pass", taken, limit, "s", 1.05, 1.25, higher_is_better=False)]


def random_sae(store: ActivationStore, site: str) -> SAE:
    """Unit rows in random directions, centred on the store's mean: every latent fires a little."""
    width = store.width(site)
    ordinary = store.statistics(site)["ordinary"]
    generator = torch.Generator().manual_seed(0)
    rows = torch.nn.functional.normalize(torch.randn(N_LATENTS, width, generator=generator), dim=1)
    config = SAEConfig(
        d_in=width,
        n_latents=N_LATENTS,
        k=K,
        site=site,
        normalization="scale",
        input_scale=float(np.sqrt(ordinary.variance.mean())),
    )
    b_dec = torch.from_numpy(ordinary.mean).float() / config.input_scale
    return SAE(config, rows, rows.clone(), torch.zeros(N_LATENTS), b_dec)


def _encode_all(store: ActivationStore, site: str, sae: SAE, batch_rows: int) -> None:
    for shard in range(store.n_shards):
        first, last = store.shard_span(shard)
        selected = np.flatnonzero(store.selected_in_shard(site, RULE, shard))
        x = store.read(site, first, last)
        for low in range(0, len(selected), batch_rows):
            sae.encode(torch.from_numpy(x[selected[low : low + batch_rows]]).float())
