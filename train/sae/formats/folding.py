"""Exact rewritings of an SAE's tensors, for formats that lack a field that ours has.

Products of a matrix and a vector are taken in float64, so that the float32 results are off by
their own rounding only.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sae_harvest.train.sae.sae import SAE

UNIT_TOLERANCE = 1e-4  # float32 rounding of a norm over a few thousand dimensions is below it


def in_model_units(sae: SAE) -> dict[str, Tensor]:
    """Tensors of an equal SAE without input_scale and output_scale, nor b_in of a transcoder.

    With s the input's scale and s_out the output's (s again where the SAE reconstructs its input):

        W_enc / s,  W_dec * s_out,  b_dec * s_out;  a transcoder: b_enc - W_enc b_in

    so that it reads and writes rows as the model gives them, with the same latents. It centres on
    b_dec; a transcoder on nothing. A normalisation by row is left for the format to do.
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
    """Return the tensors whose encoder reads c + offset and gives what it gave for c.

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
    """Return the tensors with unit decoder rows; latents grow by the norms that the rows had.

    A row of zeros stays one: its latent is never seen in a reconstruction.
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
