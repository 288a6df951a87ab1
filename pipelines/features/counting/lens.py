"""The logit lens: the next tokens that a latent makes more likely, and less likely.

The decoder row is multiplied by the scale of the model's final norm and by the unembedding; all
later blocks are skipped: W_U (g ⊙ W_dec[i]) (nostalgebraist, 2020). It is a first-order
approximation, exact for no model, and informative for late layers.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from transformers import PreTrainedModel

from sae_harvest.harvest.model.models import ResolvedModel, load_model
from sae_harvest.pipelines.features.counting.products import extreme_products

WRITES_TO_RESIDUAL = ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out")


@dataclass(frozen=True, slots=True)
class LogitLens:
    """Tokens and logits at both ends of the lens, strongest first."""

    top: npt.NDArray[np.int32]
    """int32 [n_latents, n], ids of the tokens with the highest logits."""
    top_logits: npt.NDArray[np.float32]
    """float32 [n_latents, n], their logits."""
    bottom: npt.NDArray[np.int32]
    """int32 [n_latents, n], ids of the tokens with the lowest logits."""
    bottom_logits: npt.NDArray[np.float32]
    """float32 [n_latents, n], their logits."""


def logit_lens(
    model: ResolvedModel, site: str, W_dec: torch.Tensor, n: int, n_tokens: int
) -> LogitLens | None:
    """Compute the lens of every latent; None if decoder rows don't have the unembedding's width.

    Args:
        W_dec: decoder rows [n_latents, d_in] float32.
        n: most tokens at each end.
        n_tokens: number of the tokenizer's ids; models often have padding rows after them.
    """
    if site.split(".")[0] not in WRITES_TO_RESIDUAL:
        return None
    network = load_model(model, torch.float32, "cpu")
    unembed = network.get_output_embeddings().weight.detach()[:n_tokens]  # [tokens, d_model]
    if unembed.shape[1] != W_dec.shape[1]:  # a projection in between (OPT 350M)
        return None
    n = min(n, len(unembed))
    rows = W_dec * _final_norm_scale(network)
    (top, top_logits), (bottom, bottom_logits) = extreme_products(rows, unembed, n)
    return LogitLens(
        top.int().numpy(), top_logits.numpy(), bottom.int().numpy(), bottom_logits.numpy()
    )


def _final_norm_scale(network: PreTrainedModel) -> torch.Tensor:
    """Find the elementwise scale of the last norm before the unembedding [d_model], or ones.

    The norm is the last module outside the blocks with a weight of one dimension. Some families
    multiply by 1 + weight, so the scale is computed from the module's output for a vector of ±1,
    which has mean 0 and variance 1.
    """
    width = network.config.get_text_config(decoder=True).hidden_size
    inside = {
        id(module)
        for stack in network.modules()
        if isinstance(stack, torch.nn.ModuleList)
        for module in stack.modules()
    }
    norms = [
        module
        for module in network.modules()
        if id(module) not in inside
        and isinstance(weight := getattr(module, "weight", None), torch.Tensor)
        and tuple(weight.shape) == (width,)
    ]
    if not norms:
        return torch.ones(width)
    signs = 1.0 - 2 * (torch.arange(width) % 2)  # [d_model]
    return (norms[-1](signs[None]) - norms[-1](-signs[None]))[0] / 2 * signs  # without the bias
