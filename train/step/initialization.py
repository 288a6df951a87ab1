"""Initial values of a run: scale, variance and geometric median of a sample, and tied weights."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize as unit_length

from sae_harvest.common.errors import InputError
from sae_harvest.train.config import SAEConfig, TrainConfig
from sae_harvest.train.parallel.process_group import ProcessGroup
from sae_harvest.train.sae.normalization import normalise_rows
from sae_harvest.train.sae.sae import SAE

SAMPLE_ROWS = 32_768
WEISZFELD_STEPS = 50
WEISZFELD_TOLERANCE = 1e-5  # distance moved over the median distance, below which it stops
BLOCK_LATENTS = 65_536  # latents drawn from one seed, so that a part can be drawn alone
PROBE_ROWS, PROBE_LATENTS = 2048, 4096  # sample for a quantile of pre-activations
ACTIVE_FACTOR = 3.0  # active latents at the start, in units of the k aimed at
ACTIVE = 100.0  # active latents at the start where no k is given
MAX_ACTIVE = 1 / 8  # share of the latents that are active at the start, at most
# Share of the initial floor that goes into JumpReLU's threshold. With all of it, reconstructions
# are far too large at first. With none, thresholds grow too slowly to limit the active latents,
# since each step changes them by a small share.
JUMP = 0.5
MIN_THRESHOLD = 1e-3  # its logarithm is trained
RIDGE = 1e-3  # ridge of the linear map, in units of the inputs' mean variance


@dataclass(frozen=True)
class Start:
    """Statistics of the sample that decide the initial weights."""

    input_scale: float
    """Divisor of the inputs."""
    total_variance: float
    """Variance of the normalised target, summed over dimensions."""
    b_dec: Tensor
    """Geometric median of the normalised target, float32 [d_out]."""
    probe: Tensor | None = None
    """Rows as the encoder sees them, float32 [rows, d_in]."""
    output_scale: float = 1.0
    """Divisor of a transcoder's target."""
    b_in: Tensor | None = None
    """Geometric median of a transcoder's normalised inputs, float32 [d_in]."""
    linear: Tensor | None = None
    """Least-squares map from a transcoder's inputs to its target, float32 [d_out, d_in]."""


def geometric_median(rows: Tensor) -> Tensor:
    """Return the point with the least sum of distances to the rows, by Weiszfeld's iteration.

    Outliers move it far less than the mean.

    Args:
        rows: [n, d].

    Returns:
        float64 [d].
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


def prepare(rows: Tensor, normalization: str, target: Tensor | None = None) -> Start:
    """Compute the statistics of a sample that a run needs.

    Args:
        rows: rows of the sample, [n, d_in].
        normalization: as in `TrainConfig`.
        target: the same rows of a transcoder's target, [n, d_out].

    Raises:
        InputError: all rows are equal.
    """
    rows = rows.float()
    scale, _ = _scale(rows, normalization)
    rows = normalise_rows(rows, normalization, scale)
    median = geometric_median(rows).float()
    probe = rows[:: -(-len(rows) // PROBE_ROWS)] - median  # [<= PROBE_ROWS, d_in]
    if target is None:
        return Start(scale, _scale(rows, "none")[1], median, probe)
    output_scale, variance = _scale(target.float(), normalization)
    target = target.float() / output_scale
    return Start(
        input_scale=scale,
        total_variance=variance,
        b_dec=geometric_median(target).float(),
        probe=probe,
        output_scale=output_scale,
        b_in=median,
        linear=_linear_map(rows, target),
    )


def initial_sae(
    config: TrainConfig,
    site: str,
    start: Start,
    device: torch.device,
    model: dict[str, Any],
    group: ProcessGroup | None = None,
) -> SAE:
    """Return an SAE with random unit decoder rows, parallel encoder rows, and b_dec the median.

    A transcoder's decoder rows are the images of its encoder rows under the least-squares map A
    from input to target: a row w adds (w c) A w, which is |A w| (w c) times the unit row
    A w / |A w|. So its encoder row begins as |A w| w.

    If values decide which latents are active, b_enc begins so low that the sample has ACTIVE
    latents per row, or ACTIVE_FACTOR times k. A gate's magnitude begins as its pre-activation.
    JumpReLU's threshold takes the share JUMP of this floor. Otherwise b_enc is 0.

    Args:
        model: the model in the store's plan; its `name` and `weights` are kept.
        group: the SAE holds this process's part of the latents; None for all of them.
    """
    d_in = len(start.b_dec) if start.b_in is None else len(start.b_in)
    first, last = (group or ProcessGroup()).latents(config.n_latents)
    whole = SAEConfig(
        d_in=d_in,
        d_out=None if start.b_in is None else len(start.b_dec),
        n_latents=config.n_latents,
        k=config.k if config.activation in ("topk", "batchtopk") else None,
        activation=config.sae_activation,
        site=site,
        target_site=config.target_site,
        normalization=config.normalization,
        input_scale=start.input_scale,
        output_scale=start.output_scale,
        rule=config.rule,
        model=model["name"],
        model_weights=model["weights"],
    )
    enc, dec = _weights(config, start, first, last)
    tensors = {
        "W_enc": enc.to(device, copy=True),
        "W_dec": dec.to(device, copy=True),
        "b_enc": torch.zeros(last - first, device=device),
        "b_dec": start.b_dec.to(device, copy=True),
    }
    if start.b_in is not None:
        tensors["b_in"] = start.b_in.to(device, copy=True)
    extra = {
        name: torch.zeros(last - first, device=device)
        for name in SAE.shapes(whole).keys() - tensors.keys()
    }
    if config.activation in ("jumprelu", "relu_l1", "relu_kl", "gated"):
        floor = sparse_floor(config, start)
        jump = 0.0
        if config.activation == "jumprelu":
            jump = max(MIN_THRESHOLD, JUMP * floor)
            extra["threshold"].fill_(jump)
        if config.activation == "gated":
            extra["b_mag"].fill_(-floor)
        tensors["b_enc"].fill_(jump - floor)
    # a part may have fewer latents than k: not validated again
    return SAE(whole.model_copy(update={"n_latents": last - first}), **tensors, **extra)


def random_rows(seed: int, first: int, last: int, n_latents: int, width: int) -> Tensor:
    """Return random unit rows of the latents [first, last), float32 [last - first, width].

    They are drawn on the CPU block by block, so every device and every division of the latents
    starts from the same weights.
    """
    rows = torch.empty(last - first, width)
    for block in range(first // BLOCK_LATENTS, -(-last // BLOCK_LATENTS)):
        start = block * BLOCK_LATENTS
        stop = min(start + BLOCK_LATENTS, n_latents)
        state = np.random.SeedSequence([seed, block]).generate_state(1, np.uint64)
        generator = torch.Generator().manual_seed(int(state[0]) >> 1)
        drawn = unit_length(torch.randn(stop - start, width, generator=generator))
        low, high = max(first, start), min(last, stop)
        rows[low - first : high - first] = drawn[low - start : high - start]
    return rows


def _weights(config: TrainConfig, start: Start, first: int, last: int) -> tuple[Tensor, Tensor]:
    """Return W_enc and W_dec of the latents [first, last), [last - first, d_in] and [.., d_out]."""
    width = len(start.b_dec) if start.b_in is None else len(start.b_in)
    rows = random_rows(config.seed, first, last, config.n_latents, width)
    if start.linear is None:
        return rows * encoder_length(config, width), rows
    mapped = rows @ start.linear.T  # [last - first, d_out]
    return rows * torch.linalg.vector_norm(mapped, dim=1, keepdim=True), unit_length(mapped)


def encoder_length(config: TrainConfig, d_in: int) -> float:
    """Return the length of initial encoder rows for which k random latents do not overshoot.

    The k largest of n random unit rows have products z_i |c| / sqrt(d) with c, where z_i are the
    largest of n normal numbers, so they also overlap: sum_i (w_i c) w_i is too long by a factor of
    about 1 + k E[z^2] / d. Above the quantile q that a share k / n exceeds, E[z^2] is
    1 + q pdf(q) n / k.
    Measured on SmolLM2's layer 12, d 576, n 4,608, k 32: 0.704 by least squares, 0.696 by this.
    """
    if config.k is None or config.activation not in ("topk", "batchtopk"):
        return 1.0
    share, normal = config.k / config.n_latents, NormalDist()
    square = 1.0
    if share < 1:
        quantile = normal.inv_cdf(1 - share)
        square += quantile * normal.pdf(quantile) / share
    return 1 / (1 + config.k * square / d_in)


def sparse_floor(config: TrainConfig, start: Start) -> float:
    """Return the floor that W_enc c exceeds as often as latents should be active initially."""
    assert start.probe is not None
    active = ACTIVE if config.k is None else ACTIVE_FACTOR * config.k
    density = min(MAX_ACTIVE, active / config.n_latents)
    rows, _ = _weights(config, start, 0, min(config.n_latents, PROBE_LATENTS))
    scores = (start.probe @ rows.T).flatten()  # [probe rows * latents]
    above = max(1, round(density * len(scores)))
    return float(scores.kthvalue(len(scores) - above + 1).values)


def _scale(rows: Tensor, normalization: str) -> tuple[float, float]:
    """Return the divisor of rows [n, d], and their total variance after the division."""
    total = float(rows.double().var(0, correction=0).sum())
    if total == 0:
        raise InputError(
            f"All {len(rows):,} rows sampled from the store are equal, so there is nothing to "
            "learn; harvest another site or more text."
        )
    scale = (total / rows.shape[1]) ** 0.5 if normalization == "scale" else 1.0
    return scale, total / scale**2


def _linear_map(rows: Tensor, target: Tensor) -> Tensor:
    """Return the map A with the least |target - A rows|^2 around means, float32 [d_out, d_in]."""
    rows = rows.double() - rows.double().mean(0)
    target = target.double() - target.double().mean(0)
    square = rows.T @ rows  # [d_in, d_in]
    square += RIDGE * square.diagonal().mean() * torch.eye(len(square), dtype=square.dtype)
    return torch.linalg.solve(square, rows.T @ target).T.float()
