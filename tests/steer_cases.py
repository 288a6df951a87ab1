"""A random SAE to steer with, and what clamping its latents adds, computed from the formulas."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from sae_harvest.store.rules import RowRule
from sae_harvest.train.config import SAEConfig
from sae_harvest.train.sae.sae import SAE

N_LATENTS, K = 40, 5
EVERY_ROW = RowRule(max_norm_medians=None)


def made_sae(d_in: int, site: str = "resid_post.1", **fields: Any) -> SAE:
    """Random rows, biases and thresholds; about a tenth of the latents fires on a row."""
    known = {"d_in": d_in, "n_latents": N_LATENTS, "k": K, "site": site, "rule": EVERY_ROW}
    config = SAEConfig.model_validate(known | fields)
    generator = torch.Generator().manual_seed(4)
    tensors = {
        name: torch.randn(shape, generator=generator) * 0.4
        for name, shape in SAE.shapes(config).items()
    }
    if "threshold" in tensors:
        tensors["threshold"] = tensors["threshold"].abs() + 1
    return SAE(config, **tensors)


def shift_by_hand(sae: SAE, x: np.ndarray, clamps) -> np.ndarray:
    """SAE(x | z_i = c_i) - SAE(x), dense and in float64, from the formulas in the documentation."""
    config = sae.config
    w = {name: tensor.double().numpy() for name, tensor in sae.tensors().items()}
    x = x.astype(np.float64)
    norm = np.linalg.norm(x, axis=1, keepdims=True) / np.sqrt(config.d_in)
    mean, deviation = x.mean(1, keepdims=True), x.std(1, ddof=1, keepdims=True)
    inner = {
        "none": x,
        "scale": x / config.input_scale,
        "unit_norm": x / norm,
        "layer_norm": (x - mean) / (deviation + 1e-5),
    }[config.normalization]
    pi = (inner - w.get("b_in", w["b_dec"])) @ w["W_enc"].T + w["b_enc"]
    if config.activation == "topk":
        z = np.where(pi >= np.sort(pi, axis=1)[:, [-config.k]], np.maximum(pi, 0), 0)
    elif config.activation in ("batchtopk", "jumprelu"):
        z = np.where(pi > w["threshold"], pi, 0)
    elif config.activation == "relu":
        z = np.maximum(pi, 0)
    else:
        magnitude = np.exp(w["r_mag"]) * (pi - w["b_enc"]) + w["b_mag"]
        z = np.where(pi > 0, np.maximum(magnitude, 0), 0)
    held = z.copy()
    for clamp in clamps:
        held[:, clamp.latent] = clamp.value

    def decode(latents: np.ndarray) -> np.ndarray:
        out = latents @ w["W_dec"] + w["b_dec"]
        return {
            "none": out,
            "scale": out * (config.output_scale if config.is_transcoder else config.input_scale),
            "unit_norm": out * norm,
            "layer_norm": out * deviation + mean,
        }[config.normalization]

    return decode(held) - decode(z)
