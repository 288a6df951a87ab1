"""OpenAI's sparse_autoencoder: one .pt file.

    pre_bias [d]  encoder.weight [n, d]  latent_bias [n]  decoder.weight [d, n]
    activation, activation_state_dict {k, postact_fn}
    stats_last_nonzero, latents_activation_frequency, latents_mean_square [n]: from training

Its loader normalises each row by LayerNorm if the activation is TopK, and otherwise not at all. So
the format holds two kinds of SAE: topk with layer_norm, and relu without. It refuses other keys, so
the file cannot record where the SAE comes from.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from sae_harvest.common.errors import RunError
from sae_harvest.train.config import ROW_NORMALIZATIONS
from sae_harvest.train.sae.formats.folding import in_model_units
from sae_harvest.train.sae.formats.pickles import read_pt, write_pt
from sae_harvest.train.sae.formats.reading import (
    REMEDY,
    Origin,
    Tensors,
    build,
    origin_fields,
    refusal,
)
from sae_harvest.train.sae.sae import SAE

PACKAGE = "OpenAI's sparse_autoencoder"
STATISTICS = ("stats_last_nonzero", "latents_activation_frequency", "latents_mean_square")


def write(sae: SAE, path: Path) -> None:
    """Write the file; see `train.sae.formats.Format`."""
    _check(sae)
    config, tensors, n = sae.config, in_model_units(sae), sae.config.n_latents
    topk = {"k": config.k, "postact_fn": "ReLU"}
    write_pt(
        path,
        {
            "pre_bias": tensors["b_dec"].cpu(),
            "latent_bias": tensors["b_enc"].cpu(),
            "encoder.weight": tensors["W_enc"].cpu(),
            "decoder.weight": tensors["W_dec"].T.contiguous().cpu(),  # [d_in, n_latents]
            # initial values of that package, before any row
            "stats_last_nonzero": torch.zeros(n, dtype=torch.int64),
            "latents_activation_frequency": torch.ones(n),
            "latents_mean_square": torch.zeros(n),
            "activation": "TopK" if config.activation == "topk" else "ReLU",
            "activation_state_dict": topk if config.activation == "topk" else {},
        },
    )


def _check(sae: SAE) -> None:
    config = sae.config
    if config.is_transcoder:
        raise refusal(PACKAGE, "has no transcoders", "export it as saelens or sparsify")
    if config.activation not in ("topk", "relu"):
        raise refusal(
            PACKAGE,
            f"has no activation function but topk and relu, got {config.activation}",
            "export it as saelens or dictionary_learning",
        )
    if config.activation == "topk" and config.normalization != "layer_norm":
        raise refusal(
            PACKAGE,
            f"normalises every row of a topk SAE by layer_norm, got {config.normalization}",
            "export it as saelens, sparsify or dictionary_learning",
        )
    if config.activation == "relu" and config.normalization in ROW_NORMALIZATIONS:
        raise refusal(
            PACKAGE,
            f"does not normalise the rows of a relu SAE, got {config.normalization}",
            "export it as saelens",
        )


def read(path: Path, given: Origin) -> SAE:
    """Return the SAE in the file; see `train.sae.formats.Format`."""
    found = read_pt(path)
    activation = _activation(path, found)
    # that package's state_dict() repeats the activation's own entries
    names = [name for name in found if str(name).startswith("activation")]
    tensors = Tensors({name: found[name] for name in found if name not in names}, path)
    tensors.drop(*STATISTICS)
    W_enc = tensors.take("encoder.weight", None, None)
    n, d = W_enc.shape
    taken = {
        "W_enc": W_enc,
        "W_dec": tensors.take("decoder.weight", d, n).T.contiguous(),
        "b_enc": tensors.take("latent_bias", n),
        "b_dec": tensors.take("pre_bias", d),
    }
    tensors.finish()
    return build(path, activation | origin_fields(path, given, {}, transcoder=False), taken)


def _activation(path: Path, found: dict[str, Any]) -> dict[str, Any]:
    name = found.get("activation", "ReLU")
    if isinstance(name, str) and name == "ReLU":
        return {"activation": "relu"}
    if not isinstance(name, str) or name != "TopK":
        raise refusal(
            str(path),
            f"has the activation function {_shown(name)}, which ours has not",
            "import one with TopK or ReLU",
        )
    state = found.get("activation_state_dict")
    k = state.get("k") if isinstance(state, dict) else None
    if not isinstance(state, dict) or not isinstance(k, int):
        raise RunError(f"{path} does not say how many latents TopK keeps; {REMEDY}.")
    if _shown(state.get("postact_fn")) != "ReLU":
        raise refusal(
            str(path),
            f"lets {_shown(state.get('postact_fn'))} follow TopK, where ours has ReLU",
            "import one with ReLU",
        )
    return {"activation": "topk", "k": k, "normalization": "layer_norm"}


def _shown(name: Any) -> str:
    """Return a short text for a value that should be a name."""
    return f"{name!a:.40}".strip("'") if isinstance(name, str) else type(name).__name__
