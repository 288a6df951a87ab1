"""Dictionaries made by hand, saved like trained ones."""

from __future__ import annotations

import torch

from sae_harvest.store.reader import ActivationStore
from sae_harvest.store.rules import RowRule
from sae_harvest.train.config import SAEConfig
from sae_harvest.train.sae.sae import SAE

SITE = "resid_post.1"


def config_for(store: ActivationStore, **fields) -> SAEConfig:
    """The configuration of an SAE trained on the store, with the given fields."""
    known = {
        "d_in": store.width(store.sites[0]),
        "site": SITE,
    }
    return SAEConfig.model_validate(known | fields)


def random_sae(store: ActivationStore, n_latents: int, k: int, rule: RowRule, seed=0, **fields):
    """Unit rows in random directions around the mean of the store's rows."""
    config = config_for(store, n_latents=n_latents, k=k, rule=rule, **fields)
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(n_latents, config.d_in, generator=generator)
    rows = torch.nn.functional.normalize(rows, dim=1)
    mean = store.statistics(store.sites[0])["ordinary"].mean
    b_dec = torch.from_numpy(mean[: config.d_in]).float().clone()
    return SAE(config, rows.clone(), rows, torch.zeros(n_latents), b_dec)
