"""Downstream loss: the model's cross-entropy when an SAE's output replaces its activations.

Gao et al. (2024), section 4.1. With ce the mean cross-entropy in nats per predicted token:

    delta_ce            ce with the SAE's output - ce of the plain model
    kl                  mean KL divergence from the plain model's next-token distribution
    recovered_zero      (ce with zeros - ce with the output) / (ce with zeros - ce of the model)
    recovered_mean      the same with the mean of the site's ordinary rows instead of zeros

The two recovered shares are close to 1 for nearly every dictionary, since zeros and means destroy
the model; the increase in nats is the figure to compare.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from transformers import PreTrainedModel

from sae_harvest.common.device import choose_device
from sae_harvest.common.errors import InputError
from sae_harvest.harvest.model.models import load_model
from sae_harvest.harvest.model.sites import Located, Site
from sae_harvest.pipelines.evaluate.figures import Figure, figure_of_sums
from sae_harvest.pipelines.evaluate.intervals import CLUSTERS, Floats, row_clusters
from sae_harvest.pipelines.evaluate.splicing import (
    Splice,
    located_sites,
    replaced_rows,
    replaced_site,
)
from sae_harvest.pipelines.features.encoding.dictionary import sae_fits
from sae_harvest.pipelines.source import model_of
from sae_harvest.store.reader import ActivationStore
from sae_harvest.train.sae.sae import SAE

BATCH_TOKENS = 1024  # logits are [tokens, vocabulary], in float32
ZERO, MEAN, CONTROL, EVERY_ROW = "zero", "mean", "SAE + error", "SAE, outlier rows too"
PART = "predicted tokens"
TOKENS, CE_MODEL, CE, KL = range(4)  # columns of sums


@dataclass(frozen=True, eq=False)
class SplicedLoss:
    """Sums over predicted tokens, for one splice."""

    by_cluster: Floats
    """float64 [256, 4]: tokens, cross-entropy of the model, of the splice, KL, by the cluster of
    the predicted token's document."""

    by_position: Floats
    """float64 [context_length - 1, 4]: the same by the position that predicts."""

    @classmethod
    def empty(cls, context_length: int) -> SplicedLoss:
        return cls(np.zeros((CLUSTERS, 4)), np.zeros((context_length - 1, 4)))

    def update(self, cluster: npt.NDArray[np.int64], *per_token: npt.NDArray[np.float32]) -> None:
        """Add contexts: cluster, and both cross-entropies and KL, each [contexts, length - 1]."""
        columns = np.stack([np.ones(cluster.shape), *per_token], axis=2)
        np.add.at(self.by_cluster, cluster.ravel(), columns.reshape(-1, 4))
        self.by_position[:] += columns.sum(0)

    @property
    def means(self) -> Floats:
        """Tokens, and per token: cross-entropy of the model, of the splice, KL; float64 [4]."""
        total = self.by_cluster.sum(0)
        return np.concatenate([total[:1], total[1:] / total[0]])


def spliced_losses(
    model: PreTrainedModel,
    store: ActivationStore,
    splices: Mapping[str, Splice],
    contexts: npt.NDArray[np.int64],
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, SplicedLoss]:
    """Measure the loss of the model on contexts, plain and with each splice.

    All tokens of the contexts are read; a store's contexts have no padding. The first token of a
    context is predicted by nothing and counts for no loss; its row is replaced like any other row
    that the rule selects.

    Args:
        model: the store's model in evaluation mode.
        store: the store with the contexts.
        splices: what replaces activations, by name. All have the same dictionaries' sites.
        contexts: int64 [contexts].
        progress: called with contexts done and their number.

    Returns:
        The sums of each splice, by its name.
    """
    saes = [sae for splice in splices.values() for sae in splice.saes]
    located: dict[Site, Located] = {}
    done: set[tuple[tuple[str, str | None], ...]] = set()
    for splice in splices.values():
        sites = tuple((sae.config.site, sae.config.target_site) for sae in splice.saes)
        if sites not in done:  # the model runs to find them; baselines share the SAE's
            located.update(located_sites(model, splice.saes))
            done.add(sites)
    masks = {replaced_site(sae): sae for sae in saes}
    selected = {site: replaced_rows(store, sae, contexts) for site, sae in masks.items()}
    # rows of the predicted tokens, [contexts, length - 1]
    predicted = contexts[:, None] * store.context_length + np.arange(1, store.context_length)
    cluster = row_clusters(store, predicted)
    found = {name: SplicedLoss.empty(store.context_length) for name in splices}
    batch = max(1, BATCH_TOKENS // store.context_length)
    for first in range(0, len(contexts), batch):
        here = slice(first, first + batch)
        ids = np.concatenate([store.tokens(c, c + 1) for c in contexts[here].tolist()])
        tokens = torch.from_numpy(ids.astype(np.int64)).to(model.device)  # [batch, length]
        rows = {
            site: torch.from_numpy(mask[here]).to(model.device) for site, mask in selected.items()
        }
        plain = _log_probabilities(model, tokens)
        ce_model = _cross_entropy(plain, tokens)
        for name, splice in splices.items():
            with splice.open(located, rows):
                spliced = _log_probabilities(model, tokens)
            ce, kl = _cross_entropy(spliced, tokens), _divergence(plain, spliced)
            found[name].update(cluster[here], *(t.cpu().numpy() for t in (ce_model, ce, kl)))
        progress(min(first + batch, len(contexts)), len(contexts))
    return found


def controls(store: ActivationStore, saes: Sequence[SAE]) -> dict[str, Splice]:
    """Return the splices that figures of an SAE are compared with: zeros, means, its own error."""
    means = {
        site: torch.from_numpy(store.statistics(site)["ordinary"].mean).float()
        for site in map(replaced_site, saes)
    }
    return {
        ZERO: Splice(saes, "zero"),
        MEAN: Splice(saes, "mean", means=means),
        CONTROL: Splice(saes, "control"),
        EVERY_ROW: Splice(saes, every_row=True),
    }


def downstream_figures(losses: Mapping[str, SplicedLoss]) -> Iterator[Figure]:
    """Yield the figures of each splice. ZERO and MEAN must be among the splices."""
    for name, loss in losses.items():
        sums = np.concatenate(
            [loss.by_cluster, *(losses[of].by_cluster[:, CE : CE + 1] for of in (ZERO, MEAN))],
            axis=1,
        )
        for metric, of_sums in _METRICS.items():
            if metric.startswith("recovered") and name in (ZERO, MEAN):
                continue
            tokens = round(sums[:, TOKENS].sum())
            yield figure_of_sums(metric, name, PART, sums, of_sums, tokens, "tokens")


_METRICS: dict[str, Callable[[Floats], Floats]] = {
    "ce": lambda sums: sums[..., CE] / sums[..., TOKENS],
    "delta_ce": lambda sums: (sums[..., CE] - sums[..., CE_MODEL]) / sums[..., TOKENS],
    "kl": lambda sums: sums[..., KL] / sums[..., TOKENS],
    "recovered_zero": lambda sums: (sums[..., 4] - sums[..., CE]) / (sums[..., 4] - sums[..., 1]),
    "recovered_mean": lambda sums: (sums[..., 5] - sums[..., CE]) / (sums[..., 5] - sums[..., 1]),
}


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

    kl: float
    """KL divergence from the model's distribution, in nats per predicted token."""

    @property
    def delta_ce(self) -> float:
        """Increase of the cross-entropy by the replacement, in nats per predicted token."""
        return self.ce_sae - self.ce_model

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"delta_ce": self.delta_ce}


def downstream_loss(
    place: str | Path,
    sae_paths: Sequence[Path],
    n_contexts: int,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
    device: str = "cpu",
) -> Downstream:
    """Measure the loss on contexts that hold only held-out documents.

    Args:
        place: folder or bucket address of the store.
        sae_paths: folders of SAEs, or transcoders, that were trained on sites of the store. Several
            are spliced in together, one for each site.
        n_contexts: largest number of contexts.
        on_progress: called with the number of contexts done and their total.
        device: device of model and SAEs: cpu, cuda or auto.

    Raises:
        InputError: no context is held out whole, two SAEs replace one site, or the device is
            missing.
        SaeHarvestError: store, SAE or model cannot be read, or do not fit together.
    """
    device = choose_device(device)
    store = ActivationStore.open(place)
    saes = [SAE.load(path, device) for path in sae_paths]
    for sae, path in zip(saes, sae_paths, strict=True):
        sae_fits(store, sae, path)
    contexts = heldout_contexts(store, saes, n_contexts)
    dtype: torch.dtype = getattr(torch, store.plan["compute_dtype"])
    model = load_model(model_of(store), dtype, device)
    splices = {"output": Splice(saes)}
    loss = spliced_losses(model, store, splices, contexts, on_progress)["output"]
    replaced = np.mean([replaced_rows(store, sae, contexts).mean() for sae in saes])
    tokens, ce_model, ce_sae, kl = loss.means.tolist()
    return Downstream(len(contexts), round(tokens), float(replaced), ce_model, ce_sae, kl)


def heldout_contexts(store: ActivationStore, saes: Sequence[SAE], n: int) -> npt.NDArray[np.int64]:
    """Return the first n contexts that hold only documents held out for all SAEs: int64 [<= n]."""
    # Held-out documents of a smaller fraction are held out by a larger one as well.
    rule = min((sae.config.rule for sae in saes), key=lambda rule: rule.heldout_fraction)
    rule = rule.model_copy(update={"split": "heldout", "max_norm_medians": None})
    found: list[int] = []
    for shard in range(store.n_shards):
        first, _ = store.shard_span(shard)
        rows = store.selected_in_shard(saes[0].config.site, rule, shard)
        whole = np.flatnonzero(rows.reshape(-1, store.context_length).all(axis=1))
        found.extend((first // store.context_length + whole).tolist())
        if len(found) >= n:
            break
    if not found:
        raise InputError(
            f"{store.place} has no context cut from held-out documents only; harvest more tokens."
        )
    return np.array(found[:n])


def _log_probabilities(model: PreTrainedModel, tokens: Tensor) -> Tensor:
    """Return log-probabilities of the next token, float32 [batch, length - 1, vocabulary]."""
    with torch.inference_mode():
        logits = model(input_ids=tokens, use_cache=False).logits[:, :-1].float()
        return torch.log_softmax(logits, dim=-1)


def _cross_entropy(log_probabilities: Tensor, tokens: Tensor) -> Tensor:
    """Return the cross-entropy of each token but the first, in nats [batch, length - 1]."""
    return -log_probabilities.gather(2, tokens[:, 1:, None])[..., 0]


def _divergence(plain: Tensor, spliced: Tensor) -> Tensor:
    """Return KL(plain || spliced) at each position, in nats [batch, length - 1]."""
    share = plain.exp()
    difference = (plain - spliced).masked_fill_(share == 0, 0.0)  # a token that cannot follow
    return torch.einsum("btv,btv->bt", share, difference)
