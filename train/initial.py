"""What a run starts from: a sample's scale, variance and geometric median, and tied weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from store.errors import InputError
from store.loader import ShuffledLoader
from train.config import SAEConfig, TrainConfig
from train.sae import SAE

SAMPLE_ROWS = 32_768
WEISZFELD_STEPS = 50
WEISZFELD_TOLERANCE = 1e-5  # of the distance moved, relative to the median distance


@dataclass(frozen=True)
class Start:
    """input_scale; total_variance of x / input_scale, summed over dimensions; b_dec [d_in]."""

    input_scale: float
    total_variance: float
    b_dec: Tensor


def sample_rows(loader: ShuffledLoader) -> Tensor:
    """The first SAMPLE_ROWS rows of the loader's order, or an epoch: float32 [rows, d_in]."""
    batches: list[Tensor] = []
    for _ in range(loader.batches_per_epoch):
        batches.append(loader.next_batch().x.clone())
        if sum(map(len, batches)) >= SAMPLE_ROWS:
            break
    return torch.cat(batches)[:SAMPLE_ROWS]


def geometric_median(rows: Tensor) -> Tensor:
    """The point with the least sum of distances to the rows, by Weiszfeld's iteration.

    Outlying rows pull it far less than they pull the mean. rows: [n, d]; float64 [d].
    """
    rows = rows.double()
    point = rows.mean(0)
    for _ in range(WEISZFELD_STEPS):
        distance = torch.linalg.vector_norm(rows - point, dim=1)  # [n]
        typical = distance.median()  # outliers must not set the scale
        if typical == 0:
            break  # half of the rows are this point
        weight = 1 / distance.clamp(min=1e-9 * float(typical))  # [n]
        moved = weight @ rows / weight.sum()
        step = torch.linalg.vector_norm(moved - point)
        point = moved
        if step <= WEISZFELD_TOLERANCE * typical:
            break
    return point


def prepare(rows: Tensor, normalization: str) -> Start:
    """Scale, variance and offset from a sample [n, d_in].

    Raises:
        InputError: all rows are equal.
    """
    variance = rows.double().var(0, correction=0)  # [d_in]
    total = float(variance.sum())
    if total == 0:
        raise InputError(
            f"All {len(rows):,} rows sampled from the store are equal, so there is nothing to "
            "learn; harvest another site or more text."
        )
    scale = (total / rows.shape[1]) ** 0.5 if normalization == "scale" else 1.0
    return Start(scale, total / scale**2, (geometric_median(rows) / scale).float())


def initial_sae(
    config: TrainConfig, site: str, start: Start, device: torch.device, model: dict[str, Any]
) -> SAE:
    """Random unit decoder rows, encoder equal to the decoder, b_enc zero, b_dec the median.

    `model` is what the store's plan says of the model: its `name` and `weights` are kept.
    """
    d_in = len(start.b_dec)
    # drawn on the processor, so that every device starts from the same weights
    generator = torch.Generator().manual_seed(config.seed)
    rows = torch.nn.functional.normalize(
        torch.randn(config.n_latents, d_in, generator=generator)
    )  # [n_latents, d_in]
    return SAE(
        SAEConfig(
            d_in=d_in,
            n_latents=config.n_latents,
            k=config.k,
            activation="topk",
            site=site,
            normalization=config.normalization,
            input_scale=start.input_scale,
            rule=config.rule,
            model=model["name"],
            model_weights=model["weights"],
        ),
        W_enc=rows.to(device, copy=True),
        W_dec=rows.to(device, copy=True),
        b_enc=torch.zeros(config.n_latents, device=device),
        b_dec=start.b_dec.to(device, copy=True),
    )
