"""Downstream loss: the model's cross-entropy when an SAE's output replaces its activations.

Gao et al. (2024), section 4.1. The increase over the model's own cross-entropy, in nats per token,
measures how much the model needs what the reconstruction loses.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from sae_harvest.common.device import choose_device
from sae_harvest.common.errors import InputError
from sae_harvest.harvest.model.hooks import edited
from sae_harvest.harvest.model.models import load_model
from sae_harvest.harvest.model.sites import Site, locate
from sae_harvest.pipelines.features.encoding.dictionary import sae_fits
from sae_harvest.pipelines.source import model_of
from sae_harvest.store.reader import ActivationStore
from sae_harvest.train.sae.sae import SAE

BATCH_TOKENS = 1024  # logits are [tokens, vocabulary], in float32


@dataclass(frozen=True, slots=True)
class Downstream:
    """Cross-entropies of the model, without and with the SAE in place of its activations."""

    contexts: int
    """Number of contexts."""

    tokens: int
    """Number of predicted tokens in these contexts."""

    replaced: float
    """Share of rows that were replaced; the SAE's rule leaves outlier rows unchanged."""

    ce_model: float
    """Cross-entropy of the model, in nats per predicted token."""

    ce_sae: float
    """Cross-entropy with replaced activations, in nats per predicted token."""

    @property
    def delta_ce(self) -> float:
        """Increase of the cross-entropy by the replacement, in nats per predicted token."""
        return self.ce_sae - self.ce_model

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"delta_ce": self.delta_ce}


def downstream_loss(
    place: str | Path,
    sae_path: Path,
    n_contexts: int,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
    device: str = "cpu",
) -> Downstream:
    """Measure the loss on contexts that hold only held-out documents.

    Args:
        place: folder or bucket address of the store.
        sae_path: folder of an SAE that was trained on any site of the store.
        n_contexts: largest number of contexts.
        on_progress: called with the number of contexts done and their total.
        device: device of model and SAE: cpu, cuda or auto.

    Raises:
        InputError: the SAE is a transcoder, no context is held out whole, or the device is missing.
        SaeHarvestError: store, SAE or model cannot be read, or do not fit together.
    """
    device = choose_device(device)
    store, sae = ActivationStore.open(place), SAE.load(sae_path, device)
    site = Site.parse(sae_fits(store, sae, sae_path))
    if sae.config.is_transcoder:
        raise InputError(
            f"Downstream loss replaces a site by its reconstruction, and {sae_path} predicts "
            f"{sae.config.target_site} from {site}; give an SAE of {site} instead of a transcoder."
        )
    contexts = heldout_contexts(store, sae, str(site), n_contexts)
    chosen = replaced_rows(store, sae, str(site), contexts)
    dtype: torch.dtype = getattr(torch, store.plan["compute_dtype"])
    model = load_model(model_of(store), dtype, device)
    located = locate(model, [site])
    losses = np.zeros(2)
    batch = max(1, BATCH_TOKENS // store.context_length)
    for first in range(0, len(contexts), batch):
        here = contexts[first : first + batch]
        ids = np.stack([store.tokens(c, c + 1)[0] for c in here.tolist()])
        tokens = torch.from_numpy(ids.astype(np.int64)).to(device)  # [batch, context_length]
        mask = torch.from_numpy(chosen[first : first + batch]).to(device)
        losses[0] += cross_entropy(model, tokens)

        def reconstruct(x: Tensor, mask: Tensor = mask) -> Tensor:
            rows = x[mask].float()  # [replaced, d_in]
            out = x.clone()
            out[mask] = sae.decode(*sae.encode(rows), x=rows).to(x.dtype)
            return out

        with edited(located, {site: reconstruct}):
            losses[1] += cross_entropy(model, tokens)
        on_progress(first + len(here), len(contexts))
    n_tokens = len(contexts) * (store.context_length - 1)
    ce_model, ce_sae = (losses / n_tokens).tolist()
    return Downstream(len(contexts), n_tokens, float(chosen.mean()), ce_model, ce_sae)


def heldout_contexts(store: ActivationStore, sae: SAE, site: str, n: int) -> npt.NDArray[np.int64]:
    """Return the first n contexts that hold only held-out documents: int64 [<= n]."""
    rule = sae.config.rule.model_copy(update={"split": "heldout", "max_norm_medians": None})
    found: list[int] = []
    for shard in range(store.n_shards):
        first, _ = store.shard_span(shard)
        rows = store.selected_in_shard(site, rule, shard).reshape(-1, store.context_length)
        whole = np.flatnonzero(rows.all(axis=1))
        found.extend((first // store.context_length + whole).tolist())
        if len(found) >= n:
            break
    if not found:
        raise InputError(
            f"{store.place} has no context cut from held-out documents only; harvest more tokens."
        )
    return np.array(found[:n])


def replaced_rows(
    store: ActivationStore, sae: SAE, site: str, contexts: npt.NDArray[np.int64]
) -> npt.NDArray[np.bool_]:
    """Return the rows that the SAE's rule selects by norm: bool [contexts, context_length]."""
    rule = sae.config.rule.model_copy(update={"split": "all"})
    per_shard = store.shard_rows // store.context_length
    found = np.empty((len(contexts), store.context_length), np.bool_)
    for shard in np.unique(contexts // per_shard).tolist():
        rows = store.selected_in_shard(site, rule, shard).reshape(-1, store.context_length)
        here = contexts // per_shard == shard
        found[here] = rows[contexts[here] - shard * per_shard]
    return found


def cross_entropy(model: nn.Module, tokens: Tensor) -> float:
    """Sum the cross-entropy, in nats, of all tokens but the first of [batch, context_length]."""
    with torch.inference_mode():
        logits = model(input_ids=tokens, use_cache=False).logits[:, :-1].float()
        targets = tokens[:, 1:]
        return nn.functional.cross_entropy(
            logits.flatten(0, 1), targets.flatten(), reduction="sum"
        ).item()
