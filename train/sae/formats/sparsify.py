"""EleutherAI's sparsify (eai-sparsify 1.3): a folder with cfg.json and sae.safetensors.

    encoder.weight [n, d]  encoder.bias [n]  W_dec [n, d]  b_dec [d]

TopK SAEs, and TopK transcoders between sites of one width; a transcoder does not centre its rows.
It does not normalise, so a scale is folded, and a normalisation of each row is refused.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from sae_harvest.common.atomic import new_folder
from sae_harvest.train.config import ROW_NORMALIZATIONS
from sae_harvest.train.run.files import read_tensors, write_json, write_tensors
from sae_harvest.train.sae.formats.folding import in_model_units, unit_rows
from sae_harvest.train.sae.formats.reading import (
    NOTE,
    REMEDY,
    Origin,
    Tensors,
    build,
    note,
    origin_fields,
    refusal,
    settings,
)
from sae_harvest.train.sae.sae import SAE

PACKAGE = "sparsify"
CONFIG_FILE, TENSORS_FILE = "cfg.json", "sae.safetensors"


def write(sae: SAE, path: Path) -> None:
    """Write the folder; see `train.sae.formats.Format`."""
    _check(sae)
    config, tensors = sae.config, in_model_units(sae)
    new_folder(path)
    write_tensors(
        path / TENSORS_FILE,
        {
            "encoder.weight": tensors["W_enc"],
            "encoder.bias": tensors["b_enc"],
            "W_dec": tensors["W_dec"],
            "b_dec": tensors["b_dec"],
        },
    )
    write_json(
        path / CONFIG_FILE,
        {
            "activation": "topk",
            "expansion_factor": max(1, config.n_latents // config.d_in),  # num_latents decides
            # with true, sparsify's trainer would scale the rows to norm 1 and alter the SAE
            "normalize_decoder": unit_rows(tensors["W_dec"]),
            "num_latents": config.n_latents,
            "k": config.k,
            "multi_topk": False,
            "skip_connection": False,
            "transcode": config.is_transcoder,
            "d_in": config.d_in,
            NOTE: note(sae),  # its loader ignores unknown fields
        },
    )


def _check(sae: SAE) -> None:
    config = sae.config
    if config.activation != "topk":
        raise refusal(
            PACKAGE,
            f"has no activation function but topk, got {config.activation}",
            "export it as saelens" + ("" if config.is_transcoder else " or dictionary_learning"),
        )
    if config.normalization in ROW_NORMALIZATIONS:
        raise refusal(
            PACKAGE,
            f"does not normalise rows, got {config.normalization}",
            "export it as saelens" + (" or openai" * (config.normalization == "layer_norm")),
        )
    if config.width_out != config.d_in:
        raise refusal(
            PACKAGE,
            f"has transcoders between sites of one width only, got {config.d_in} and "
            f"{config.width_out}",
            "train one between such sites, or one with jumprelu or relu and export it as saelens",
        )


def read(path: Path, given: Origin) -> SAE:
    """Return the SAE in the folder; see `train.sae.formats.Format`."""
    fields = settings(path, CONFIG_FILE, PACKAGE)
    activation = fields.get("activation", str, "topk")
    if activation != "topk":
        raise refusal(
            str(path), f"has the activation {activation!a:.60}, which ours has not", "import a topk"
        )
    for name, meaning in (
        ("skip_connection", "a linear skip connection"),
        ("signed", "latents below zero"),
    ):
        if fields.get(name, bool, False):
            raise refusal(str(path), f"has {meaning}, which ours has not", "import one without")
    transcoder = fields.get("transcode", bool, False)
    file = path / TENSORS_FILE
    tensors = Tensors(read_tensors(file, f"The SAE of {PACKAGE}", REMEDY), file)
    W_enc = tensors.take("encoder.weight", None, fields.need("d_in", int))
    n, d = W_enc.shape
    taken: dict[str, Tensor] = {
        "W_enc": W_enc,
        "W_dec": tensors.take("W_dec", n, d),
        "b_enc": tensors.take("encoder.bias", n),
        "b_dec": tensors.take("b_dec", d),
    }
    tensors.finish()
    if transcoder:
        taken["b_in"] = torch.zeros(d)
    shape = {"activation": "topk", "k": fields.need("k", int), "d_out": d if transcoder else None}
    found = fields.get(NOTE, dict, {})
    return build(path, shape | origin_fields(path, given, found, transcoder), taken)
