"""Dictionaries that know nothing, beside which every figure of a trained SAE is printed.

    random             random directions: the SAE's k, and the norms of its rows
    shuffled decoder   the SAE with the rows of its decoder in random order
    PCA                the principal axes of training rows, each in both directions
    channels           the dimensions of the site themselves, each in both directions
    mean               the mean of training rows, whatever the input

Each is an `SAE`, so that every metric treats it like the trained one. Axes and dimensions make no
prediction of another site, so a transcoder has no PCA and no channels beside it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from sae_harvest.common.errors import InputError
from sae_harvest.store.loading.chunks import selected_at
from sae_harvest.store.reader import ActivationStore
from sae_harvest.train.config import SAEConfig
from sae_harvest.train.evaluate import batches, sites_of
from sae_harvest.train.sae.normalization import normalise, normalise_target
from sae_harvest.train.sae.sae import SAE

RANDOM, SHUFFLED, PCA, CHANNELS, MEAN = "random", "shuffled decoder", "PCA", "channels", "mean"
TRAINING_ROWS = 65_536  # for the mean and the axes
NEVER = -1e6  # a bias below every dot product of rows and weights


def baselines(store: ActivationStore, sae: SAE, l0: float, seed: int = 0) -> dict[str, SAE]:
    """Return the baselines of an SAE by name, on its device.

    Args:
        store: the store that the SAE was trained on; its first 65,536 training rows are read.
        sae: the trained SAE.
        l0: mean number of active latents per row of the SAE; rounded, it is the k of the baselines.
        seed: seed of the random directions and of the order of the decoder's rows.

    Raises:
        InputError: the store holds no row of a training document.
        DamagedError: a row is not finite, or an object of the store is damaged.
    """
    config, k = sae.config, max(1, round(l0))
    generator = torch.Generator().manual_seed(seed)
    rows = _TrainingRows.of(store, config)
    unscaled = {"normalization": "none", "input_scale": 1.0, "output_scale": 1.0}
    as_they_are = SAEConfig.model_validate(config.model_dump() | unscaled)
    found = {
        RANDOM: random_sae(sae, k, generator),
        SHUFFLED: _shuffled(sae, generator),
        MEAN: _both_directions(as_they_are, torch.zeros(1, config.width_out), rows.mean, 1),
    }
    found[MEAN].b_enc[:] = NEVER
    if not config.is_transcoder:
        found[PCA] = _both_directions(config, rows.axes, rows.normalised_mean, k)
        channels = torch.eye(config.d_in)
        found[CHANNELS] = _both_directions(config, channels, rows.normalised_mean, k)
    return {name: baseline.to(sae.device) for name, baseline in found.items()}


def random_sae(sae: SAE, k: int, generator: torch.Generator) -> SAE:
    """Return random directions with the norms of an SAE's rows; encoder and decoder share them."""
    config = _topk(sae.config, sae.config.n_latents, k)
    weights = {name: sae.tensors()[name].cpu() for name in ("W_enc", "W_dec")}
    rows = torch.randn(weights["W_enc"].shape, generator=generator)
    written = rows
    if config.is_transcoder:
        written = torch.randn(weights["W_dec"].shape, generator=generator)
    tensors = {
        name: torch.nn.functional.normalize(directions, dim=1)
        * torch.linalg.vector_norm(weights[name], dim=1, keepdim=True)
        for name, directions in (("W_enc", rows), ("W_dec", written))
    }
    biases = {name: sae.tensors()[name].cpu() for name in SAE.shapes(config) if name[:2] == "b_"}
    return SAE(config, **tensors, **biases | {"b_enc": torch.zeros(config.n_latents)})


def _shuffled(sae: SAE, generator: torch.Generator) -> SAE:
    """Return the SAE with its decoder's rows in random order."""
    order = torch.randperm(sae.config.n_latents, generator=generator)
    tensors = {name: tensor.cpu() for name, tensor in sae.tensors().items()}
    return SAE(sae.config, **tensors | {"W_dec": tensors["W_dec"][order].contiguous()})


def _both_directions(config: SAEConfig, axes: Tensor, mean: Tensor, k: int) -> SAE:
    """Return a TopK SAE whose latents are the axes [n, d] and their opposites."""
    rows = torch.cat([axes, -axes])  # [2 n, d_out]
    n = len(rows)
    written = _topk(config, n, min(k, len(axes)))
    inputs: dict[str, Tensor] = {}
    if config.is_transcoder:
        inputs["b_in"] = torch.zeros(config.d_in)
    encoder = torch.zeros(n, config.d_in) if config.is_transcoder else rows.clone()
    return SAE(written, encoder, rows, torch.zeros(n), mean.clone(), **inputs)


def _topk(config: SAEConfig, n_latents: int, k: int) -> SAEConfig:
    """Return the configuration with the TopK activation function and another size."""
    changed = {"n_latents": n_latents, "k": min(k, n_latents), "activation": "topk"}
    return SAEConfig.model_validate(config.model_dump() | changed)


@dataclass(frozen=True, eq=False)
class _TrainingRows:
    """Sums over training rows, as baselines need them."""

    mean: Tensor
    """Mean of the rows that the SAE should return, float32 [d_out]."""

    normalised_mean: Tensor
    """Mean of normalised rows, float32 [d_out]."""

    axes: Tensor
    """Principal axes of normalised rows, by decreasing variance, float32 [d_out, d_out]."""

    @classmethod
    def of(cls, store: ActivationStore, config: SAEConfig) -> _TrainingRows:
        """Read the first training rows. Raise `InputError` if there are none."""
        width = config.width_out
        n, total, raw, products = 0, np.zeros(width), np.zeros(width), np.zeros((width, width))
        for _, _, wanted in batches(store, config, _first_training_rows(store, config)):
            unit = normalise_target if config.is_transcoder else normalise
            x = unit(wanted, config).double().numpy()
            n += len(x)
            total += x.sum(0)
            raw += wanted.double().numpy().sum(0)
            products += x.T @ x
        if n == 0:
            raise InputError(
                f"{store.place} holds no row that the SAE was trained on, so there is no mean and "
                "no principal axis to compare with; evaluate on the store that it was trained on."
            )
        mean = total / n
        _, axes = np.linalg.eigh(products / n - np.outer(mean, mean))
        ordered = np.ascontiguousarray(axes.T[::-1])
        return cls(*(torch.from_numpy(array).float() for array in (raw / n, mean, ordered)))


def _first_training_rows(store: ActivationStore, config: SAEConfig) -> npt.NDArray[np.int64]:
    """Return the numbers of the first rows that the SAE's rule selects for training."""
    rule = config.rule.model_copy(update={"split": "train"})
    found: list[npt.NDArray[np.int64]] = []
    left = TRAINING_ROWS
    for shard in range(store.n_shards):
        if left == 0:
            break
        here = np.flatnonzero(selected_at(store, sites_of(store, config), rule, shard))[:left]
        found.append(here + store.shard_span(shard)[0])
        left -= len(here)
    return np.concatenate(found)
