"""Normalisation of rows before the encoder, and its inverse for reconstructions.

    none        x' = x
    scale       x' = x / input_scale                       one number for all rows
    unit_norm   x' = sqrt(d) x / |x|
    layer_norm  x' = (x - mean) / (deviation + 1e-5)       mean and deviation of the row's numbers

All but the first give a row about the norm sqrt(d). `layer_norm` follows OpenAI's
sparse_autoencoder: the deviation is unbiased (divided by d - 1), and 1e-5 is added to the
deviation, not to the variance.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sae_harvest.train.config import SAEConfig

LAYER_NORM_EPS = 1e-5
MIN_NORM = 1e-12  # keeps a row of zeros unchanged


def normalise(x: Tensor, config: SAEConfig, out: Tensor | None = None) -> Tensor:
    """Return x' of float32 rows [batch, d_in], written to `out` if given (not x itself)."""
    return normalise_rows(x, config.normalization, config.input_scale, out)


def normalise_rows(
    x: Tensor, normalization: str, scale: float, out: Tensor | None = None
) -> Tensor:
    """Return x' of rows without an `SAEConfig`; see `normalise`."""
    if normalization == "unit_norm":
        return torch.div(x, _length(x), out=out)
    if normalization == "layer_norm":
        mean, deviation = _moments(x)
        return torch.sub(x, mean, out=out).div_(deviation)
    return torch.div(x, scale, out=out)


def normalise_target(target: Tensor, config: SAEConfig) -> Tensor:
    """Return the target of a transcoder in the units of its output: float32 [batch, d_out]."""
    return target.float() / config.output_scale


def restore(reconstruction: Tensor, x: Tensor | None, config: SAEConfig) -> Tensor:
    """Return the reconstruction [batch, d_out] in the units of the model; changed in place.

    Args:
        x: the rows that `normalise` received; needed if a row is normalised by its own numbers.
    """
    if config.normalization == "unit_norm":
        assert x is not None
        return reconstruction.mul_(_length(x))
    if config.normalization == "layer_norm":
        assert x is not None
        # without 1e-5, as in sparse_autoencoder, the format in which such SAEs are shared
        deviation, mean = torch.std_mean(x, dim=1, keepdim=True)
        return reconstruction.mul_(deviation).add_(mean)
    return reconstruction.mul_(config.output_scale if config.is_transcoder else config.input_scale)


def _length(x: Tensor) -> Tensor:
    """Return |x| / sqrt(d), [batch, 1]."""
    norm = torch.linalg.vector_norm(x, dim=1, keepdim=True)
    return norm.clamp_(min=MIN_NORM).div_(x.shape[1] ** 0.5)


def _moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean, and the deviation plus LAYER_NORM_EPS, [batch, 1] each."""
    deviation, mean = torch.std_mean(x, dim=1, keepdim=True)
    return mean, deviation.add_(LAYER_NORM_EPS)
