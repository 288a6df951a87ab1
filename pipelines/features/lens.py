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

from harvest.models import ResolvedModel, load_model

BLOCK = 512
WRITES_TO_RESIDUAL = ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out")


@dataclass(frozen=True, slots=True)
class LogitLens:
    """Tokens and logits at either end, [n_latents, n]; strongest first."""

    top: npt.NDArray[np.int32]
    top_logits: npt.NDArray[np.float32]
    bottom: npt.NDArray[np.int32]
    bottom_logits: npt.NDArray[np.float32]


def logit_lens(model: ResolvedModel, site: str, W_dec: torch.Tensor, n: int) -> LogitLens | None:
    """The lens of every latent; None where the site does not write to the residual stream.

    Args:
        W_dec: decoder rows [n_latents, d_in] float32.
        n: tokens kept at either end.
    """
    if site.split(".")[0] not in WRITES_TO_RESIDUAL:
        return None
    network = load_model(model, torch.float32, "cpu")
    unembed = network.get_output_embeddings().weight.detach().bfloat16()  # [vocabulary, d_model]
    scale = _final_norm_scale(network)
    rows = (W_dec * scale).bfloat16()
    found = []
    for first in range(0, len(rows), BLOCK):
        logits = (rows[first : first + BLOCK] @ unembed.T).float()  # [block, vocabulary]
        logits -= logits.mean(dim=1, keepdim=True)  # softmax ignores a constant
        high, low = logits.topk(n, dim=1), logits.topk(n, dim=1, largest=False)
        found.append((high.indices.int(), high.values, low.indices.int(), low.values))
    top, top_logits, bottom, bottom_logits = (
        torch.cat(p).numpy() for p in zip(*found, strict=True)
    )
    return LogitLens(top, top_logits, bottom, bottom_logits)


def _final_norm_scale(network: PreTrainedModel) -> torch.Tensor:
    """Elementwise scale of the last norm before the unembedding [d_model], or one.

    It is the last module outside the blocks with a weight of one dimension.
    """
    width = network.config.get_text_config(decoder=True).hidden_size
    inside = {
        id(module)
        for stack in network.modules()
        if isinstance(stack, torch.nn.ModuleList)
        for module in stack.modules()
    }
    scale, kind = torch.ones(width), ""
    for module in network.modules():
        weight = getattr(module, "weight", None)
        if id(module) in inside or not isinstance(weight, torch.Tensor):
            continue
        if tuple(weight.shape) == (width,):
            scale, kind = weight.detach().float(), type(module).__name__
    # Gemma's norms multiply by 1 + weight.
    return 1 + scale if kind.startswith("Gemma") else scale
