"""Any open language model as a searchable table of concepts.

    import sae_harvest as sh

    store = sh.harvest_activations("runs/gpt2/store", model="gpt2", layer=8, tokens=1_000_000)
    for batch in sh.ActivationDataset(store, batch_rows=4096):  # float32 [4096, width]
        ...
    sae = sh.train_sae(store, "runs/gpt2/sae", n_latents=16_384, k=32, tokens=10_000_000)
    indices, values = sae.encode(batch)
    features = sh.build_features(store, "runs/gpt2/sae", "runs/gpt2/features")
    features.sql("SELECT latent, top_tokens FROM latents ORDER BY density DESC LIMIT 5")
    features.steer("I opened the door and", {123: 8.0}).text

The names in `__all__` are the public ones; `help(sae_harvest.NAME)` documents each. Modules
below this one may change between releases.
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sae_harvest.common.errors import (
        DamagedError,
        InputError,
        NotAStoreError,
        PlanMismatchError,
        RunError,
        SaeHarvestError,
        StoreError,
        UnfinishedError,
    )
    from sae_harvest.dataset import ActivationDataset
    from sae_harvest.features import Features, Latent, open_features
    from sae_harvest.harvest.inspect.provenance import Provenance, trace_row
    from sae_harvest.harvest.run.config import HarvestConfig
    from sae_harvest.harvest.text.corpus import CorpusSpec
    from sae_harvest.pipelines.features.building.config import FeatureConfig
    from sae_harvest.pipelines.live import LiveText
    from sae_harvest.pipelines.steer import Generated
    from sae_harvest.steps import build_features, harvest_activations, open_store, train_sae
    from sae_harvest.store.loading.loader import ShuffledLoader
    from sae_harvest.store.reader import ActivationStore
    from sae_harvest.store.rules import RowRule
    from sae_harvest.train.config import SAEConfig, TrainConfig
    from sae_harvest.train.sae.formats import load_sae
    from sae_harvest.train.sae.sae import SAE

# Name → module, imported at first use: importing all of them takes seconds.
_MODULES = {
    "ActivationDataset": "dataset",
    "ActivationStore": "store.reader",
    "CorpusSpec": "harvest.text.corpus",
    "DamagedError": "common.errors",
    "FeatureConfig": "pipelines.features.building.config",
    "Features": "features",
    "Generated": "pipelines.steer",
    "HarvestConfig": "harvest.run.config",
    "InputError": "common.errors",
    "Latent": "features",
    "LiveText": "pipelines.live",
    "NotAStoreError": "common.errors",
    "PlanMismatchError": "common.errors",
    "Provenance": "harvest.inspect.provenance",
    "RowRule": "store.rules",
    "RunError": "common.errors",
    "SAE": "train.sae.sae",
    "SAEConfig": "train.config",
    "SaeHarvestError": "common.errors",
    "ShuffledLoader": "store.loading.loader",
    "StoreError": "common.errors",
    "TrainConfig": "train.config",
    "UnfinishedError": "common.errors",
    "build_features": "steps",
    "harvest_activations": "steps",
    "load_sae": "train.sae.formats",
    "open_features": "features",
    "open_store": "steps",
    "trace_row": "harvest.inspect.provenance",
    "train_sae": "steps",
}

__all__ = [
    "SAE",
    "ActivationDataset",
    "ActivationStore",
    "CorpusSpec",
    "DamagedError",
    "FeatureConfig",
    "Features",
    "Generated",
    "HarvestConfig",
    "InputError",
    "Latent",
    "LiveText",
    "NotAStoreError",
    "PlanMismatchError",
    "Provenance",
    "RowRule",
    "RunError",
    "SAEConfig",
    "SaeHarvestError",
    "ShuffledLoader",
    "StoreError",
    "TrainConfig",
    "UnfinishedError",
    "__version__",
    "build_features",
    "harvest_activations",
    "load_sae",
    "open_features",
    "open_store",
    "trace_row",
    "train_sae",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return version("sae-harvest")
    if name not in _MODULES:
        raise AttributeError(f"module 'sae_harvest' has no attribute {name!r}")
    found = getattr(import_module(f"sae_harvest.{_MODULES[name]}"), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
