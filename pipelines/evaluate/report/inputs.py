"""Inputs of the parts of an evaluation: store, SAE, baselines, model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from transformers import PreTrainedModel

from sae_harvest.common.device import choose_device
from sae_harvest.harvest.model.models import ResolvedModel, load_model
from sae_harvest.pipelines.evaluate.baselines import baselines
from sae_harvest.pipelines.evaluate.figures import SAE_ITSELF
from sae_harvest.pipelines.evaluate.reconstruction import HeldoutRows
from sae_harvest.pipelines.evaluate.report.settings import EvaluationSettings
from sae_harvest.pipelines.source import model_of
from sae_harvest.store.reader import ActivationStore
from sae_harvest.train.evaluate import batches
from sae_harvest.train.sae.sae import SAE

L0_ROWS = 4096  # rows that give the k of the baselines

Count = Callable[[int, int], None]  # things done and to do
Progress = Callable[[str], Count]  # of a part, by its name


class StoreModel:
    """The model of a store, loaded when it is first needed, once for each dtype."""

    def __init__(self, store: ActivationStore, device: str) -> None:
        """`device`: cpu, cuda or auto."""
        self._store, self._device = store, device
        self._loaded: dict[torch.dtype, PreTrainedModel] = {}

    @cached_property
    def resolved(self) -> ResolvedModel:
        """Place and identity of the model."""
        return model_of(self._store)

    def of(self, dtype: torch.dtype | None = None) -> PreTrainedModel:
        """Return the model; None: in the dtype that the store was harvested in."""
        wanted: torch.dtype = dtype or getattr(torch, self._store.plan["compute_dtype"])
        if wanted not in self._loaded:
            device = choose_device(self._device)
            self._loaded[wanted] = load_model(self.resolved, wanted, device)
        return self._loaded[wanted]


@dataclass(frozen=True, eq=False)
class Inputs:
    """The inputs of one SAE's evaluation. What takes long is made when it is first needed."""

    report: Path
    """Folder of the report."""

    store: ActivationStore
    """A store with the SAE's site."""

    name: str
    """Name of the SAE in the report."""

    path: Path
    """Folder of the SAE."""

    sae: SAE
    """The SAE."""

    features: Path | None
    """Folder of the SAE's feature tables over the store."""

    settings: EvaluationSettings
    """Sample sizes."""

    device: str
    """Device of the model: cpu, cuda or auto."""

    model: StoreModel
    """The store's model."""

    progress: Progress
    """Given the name of a part, returns a function of things done and to do."""

    @cached_property
    def digest(self) -> str:
        """Identity of the SAE."""
        return self.sae.digest

    @cached_property
    def dictionaries(self) -> dict[str, SAE]:
        """The SAE and its baselines, by name."""
        return {SAE_ITSELF: self.sae} | baselines(self.store, self.sae, self._l0())

    def _l0(self) -> float:
        """Return the mean number of active latents on some held-out rows."""
        sae, store = self.sae, self.store
        if sae.config.activation == "topk" and sae.config.k is not None:
            return float(sae.config.k)
        held_out = HeldoutRows.of(store, sae.config, sae.config.rule, L0_ROWS)
        rows = held_out.rows[held_out.part("without outliers")]
        read = batches(store, sae.config, rows)
        return sum(int((sae.encode(x)[1] > 0).sum()) for _, x, _ in read) / max(1, len(rows))
