"""Exact rewriting of an SAE's tensors, for formats that lack one of our fields.

Products of a matrix and a vector are computed in float64, so the float32 results have only their
own rounding error.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sae_harvest.train.sae.sae import SAE

UNIT_TOLERANCE = 1e-4  # float32 rounding of a norm over a few thousand dimensions is below it


def in_model_units(sae: SAE) -> dict[str, Tensor]:
    """Return the tensors of an equal SAE without input_scale, output_scale and b_in.

    Here s is input_scale, and s_out is output_scale (or s if the SAE reconstructs its input):

        W_enc / s,  W_dec * s_out,  b_dec * s_out;  a transcoder: b_enc - W_enc b_in

    The result reads and writes rows in the units of the model, with the same latents. It centres on
    b_dec; a transcoder does not centre. A normalisation of each row is left to the format.
    """
    config = sae.config
    tensors = dict(sae.tensors())
    if config.is_transcoder:
        tensors = absorb(tensors, tensors.pop("b_in"))
    scale_out = config.output_scale if config.is_transcoder else config.input_scale
    if (config.input_scale, scale_out) != (1.0, 1.0):
        tensors["W_enc"] = tensors["W_enc"] / config.input_scale
        tensors["W_dec"] = tensors["W_dec"] * scale_out
        tensors["b_dec"] = tensors["b_dec"] * scale_out
    return tensors


def absorb(tensors: dict[str, Tensor], offset: Tensor) -> dict[str, Tensor]:
    """Return tensors with an encoder that gives for c + offset what it gave for c.

        W_enc c + b_enc = W_enc (c + offset) + (b_enc - W_enc offset)

    and the same for b_mag, through the magnitude's exp(r_mag). offset: float32 [d_in].
    """
    shift = tensors["W_enc"].double() @ offset.double()  # [n_latents]
    changed = {"b_enc": (tensors["b_enc"].double() - shift).float()}
    if "b_mag" in tensors:
        shift = shift * tensors["r_mag"].double().exp()
        changed["b_mag"] = (tensors["b_mag"].double() - shift).float()
    return tensors | changed


def rescaled(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors with unit decoder rows; latents are multiplied by the rows' former norms.

    A row of zeros stays: its latent adds nothing to a reconstruction.
    """
    norms = tensors["W_dec"].norm(dim=1)  # [n_latents]
    divisor = torch.where(norms > 0, norms, torch.ones_like(norms))
    return tensors | {
        "W_enc": tensors["W_enc"] * norms[:, None],
        "b_enc": tensors["b_enc"] * norms,
        "W_dec": tensors["W_dec"] / divisor[:, None],
    }


def unit_rows(weight: Tensor) -> bool:
    """Whether all rows [n_latents, d] have norm 1, up to rounding."""
    return bool(((weight.norm(dim=1) - 1).abs() < UNIT_TOLERANCE).all())
