"""The logit lens: which next tokens a latent speaks for, and against.

The decoder row goes through the model's own final norm scale and unembedding, skipping every
later block: W_U (g ⊙ W_dec[i]) (nostalgebraist, 2020). It is a first-order reading, exact for
no model, telling for late layers.
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
    """Tokens and logits at either end, [n_latents, n]; strongest first."""

    top: npt.NDArray[np.int32]
    top_logits: npt.NDArray[np.float32]
    bottom: npt.NDArray[np.int32]
    bottom_logits: npt.NDArray[np.float32]


def logit_lens(
    model: ResolvedModel, site: str, W_dec: torch.Tensor, n: int, n_tokens: int
) -> LogitLens | None:
    """The lens of every latent; None where its decoder rows are not what the unembedding reads.

    Args:
        W_dec: decoder rows [n_latents, d_in] float32.
        n: tokens kept at either end, at most.
        n_tokens: ids of the tokenizer; models often have rows of padding beyond them.
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
    """Elementwise scale of the last norm before the unembedding [d_model], or one.

    It is the last module outside the blocks with a weight of one dimension. What it does with
    the weight (some families multiply by 1 + weight) is read off its answer to a vector of ±1,
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
