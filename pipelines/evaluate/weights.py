"""Figures of the weights themselves: norms, biases, and how similar latents are to each other."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from sae_harvest.pipelines.evaluate.figures import Figure
from sae_harvest.train.sae.sae import SAE

PART = "weights"
QUANTILES = (0.05, 0.5, 0.95)
ALIKE = 0.9  # latents with a higher cosine are named copies
COMPARED = 4096  # latents, drawn evenly, whose nearest latent is searched among all
TILE = 512  # of them at a time


def weight_figures(sae: SAE, subject: str) -> Iterator[Figure]:
    """Yield figures of an SAE's weights: quantiles, means, and the share of copies.

    `encoder_nearest` and `decoder_nearest` are the largest cosine of a latent's row with another's;
    the decoder row of a copy has one above 0.9. These are exact values, of all latents or of 4,096
    that are evenly spaced.
    """
    n = sae.config.n_latents
    columns = {
        "encoder_norm": torch.linalg.vector_norm(sae.W_enc, dim=1),
        "decoder_norm": torch.linalg.vector_norm(sae.W_dec, dim=1),
        "encoder_bias": sae.b_enc,
    }
    if not sae.config.is_transcoder:
        columns["encoder_decoder_cosine"] = torch.nn.functional.cosine_similarity(
            sae.W_enc, sae.W_dec, dim=1
        )
    if n > 1:
        columns["encoder_nearest"] = nearest_cosine(sae.W_enc)
        columns["decoder_nearest"] = nearest_cosine(sae.W_dec)
    for name, values in columns.items():
        found = values.cpu().double().numpy()
        shown = {f"q{round(100 * share):02d}": np.quantile(found, share) for share in QUANTILES}
        for suffix, value in (shown | {"mean": found.mean()}).items():
            metric = f"{name}_{suffix}"
            yield Figure(metric, subject, PART, float(value), None, None, len(found), "latents")
    if n > 1:
        copies = float((columns["decoder_nearest"] > ALIKE).double().mean())
        count = len(columns["decoder_nearest"])
        yield Figure("copy_share", subject, PART, copies, None, None, count, "latents")


def nearest_cosine(rows: Tensor) -> Tensor:
    """Return the largest cosine of some rows [n, d] with another row, float32 [at most 4096]."""
    unit = torch.nn.functional.normalize(rows, dim=1)
    n = len(unit)
    chosen = torch.from_numpy(np.unique(np.linspace(0, n - 1, min(n, COMPARED)).astype(np.int64)))
    chosen = chosen.to(rows.device)
    found = []
    for part in chosen.split(TILE):
        cosines = unit[part] @ unit.T  # [tile, n]
        cosines[torch.arange(len(part), device=rows.device), part] = -2.0  # not with itself
        found.append(cosines.amax(dim=1))
    return torch.cat(found)
