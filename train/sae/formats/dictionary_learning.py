"""dictionary_learning 0.1: a folder with ae.pt and config.json, which names the class.

    AutoEncoder            relu       bias [d]
    AutoEncoderNew         relu       decoder.bias [d], not subtracted from the rows; read only
    GatedAutoEncoder       gated      decoder_bias [d]  r_mag [n]  gate_bias [n]  mag_bias [n]
    AutoEncoderTopK        topk       b_dec [d]  k  threshold, -1 for none
    BatchTopKSAE           batchtopk  b_dec [d]  k  threshold
        all these: encoder.weight [n, d]  encoder.bias [n], not gated  decoder.weight [d, n]
    JumpReluAutoEncoder    jumprelu   W_enc [d, n]  b_enc [n]  W_dec [n, d]  b_dec [d], not taken
                                      off the rows  threshold [n]
    MatryoshkaBatchTopKSAE batchtopk  the same, but b_dec taken off, k, threshold, group_sizes;
                                      read only

Rows are in the units of the model: that package folds its normalisation factor when it saves, and
so do we. A normalisation of each row is refused. The format has no transcoders.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sae_harvest.common.atomic import new_folder
from sae_harvest.common.errors import RunError
from sae_harvest.train.config import COUNTED, ROW_NORMALIZATIONS
from sae_harvest.train.run.files import write_json
from sae_harvest.train.sae.formats.folding import absorb, in_model_units
from sae_harvest.train.sae.formats.pickles import read_pt, write_pt
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

PACKAGE = "dictionary_learning"
CONFIG_FILE, TENSORS_FILE = "config.json", "ae.pt"
CLASSES = {
    "topk": "AutoEncoderTopK",
    "batchtopk": "BatchTopKSAE",
    "jumprelu": "JumpReluAutoEncoder",
    "relu": "AutoEncoder",
    "gated": "GatedAutoEncoder",
}


def write(sae: SAE, path: Path) -> None:
    """Write the folder; see `train.sae.formats.Format`."""
    config = sae.config
    if config.is_transcoder:
        raise refusal(PACKAGE, "has no transcoders", "export it as saelens or sparsify")
    if config.normalization in ROW_NORMALIZATIONS:
        raise refusal(
            PACKAGE, f"does not normalise rows, got {config.normalization}", "export it as saelens"
        )
    new_folder(path)
    tensors = {name: tensor.cpu() for name, tensor in in_model_units(sae).items()}
    write_pt(path / TENSORS_FILE, _state(sae, tensors))
    layer = config.site.rpartition(".")[2]
    write_json(
        path / CONFIG_FILE,
        {
            "trainer": {
                "dict_class": CLASSES[config.activation],
                "activation_dim": config.d_in,
                "dict_size": config.n_latents,
                "k": config.k,
                "layer": int(layer) if layer.isdecimal() else None,
                "lm_name": config.model,
                "submodule_name": config.site,
            },
            NOTE: note(sae),
        },
    )


def _state(sae: SAE, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of the class's state_dict, under its names."""
    activation, b_dec = sae.config.activation, tensors["b_dec"]
    if activation == "jumprelu":
        tensors = absorb(tensors, b_dec)  # rows come uncentred
        return {
            "W_enc": tensors["W_enc"].T.contiguous(),
            "b_enc": tensors["b_enc"],
            "W_dec": tensors["W_dec"],
            "b_dec": b_dec,
            "threshold": tensors["threshold"],
        }
    state = {
        "encoder.weight": tensors["W_enc"],
        "decoder.weight": tensors["W_dec"].T.contiguous(),
    }
    if activation == "gated":
        return state | {
            "decoder_bias": b_dec,
            "gate_bias": tensors["b_enc"],
            "mag_bias": tensors["b_mag"],
            "r_mag": tensors["r_mag"],
        }
    state["encoder.bias"] = tensors["b_enc"]
    if activation == "relu":
        return state | {"bias": b_dec}
    threshold = tensors["threshold"].max() if activation == "batchtopk" else torch.tensor(-1.0)
    k = torch.tensor(sae.config.k, dtype=torch.int32)
    return state | {"b_dec": b_dec, "k": k, "threshold": threshold}


def read(path: Path, given: Origin) -> SAE:
    """Return the SAE in the folder; see `train.sae.formats.Format`."""
    fields = settings(path, CONFIG_FILE, PACKAGE)
    trainer = fields.need("trainer", dict)
    name = trainer.get("dict_class")
    reader = READERS.get(str(name))
    if reader is None:
        raise refusal(
            str(path),
            f"holds a {name!r:.60}, which ours cannot be",
            f"import one of {', '.join(READERS)}",
        )
    file = path / TENSORS_FILE
    tensors = Tensors(read_pt(file), file)
    shape, taken = reader(tensors, file)
    if shape["activation"] in COUNTED:
        shape["k"] = _k(tensors, trainer.get("k"), path)
    tensors.finish()
    found = {"model": trainer.get("lm_name")} | fields.get(NOTE, dict, {})
    return build(path, shape | origin_fields(path, given, found, transcoder=False), taken)


def _k(tensors: Tensors, stated: Any, path: Path) -> int:
    """Return k from ae.pt, or from config.json, where older versions keep it."""
    stated = stated if isinstance(stated, int) and not isinstance(stated, bool) else None
    if not tensors.has("k"):
        if stated is None:
            raise RunError(
                f"{path} says in neither {TENSORS_FILE} nor {CONFIG_FILE} (trainer, k) how many "
                f"latents its SAE keeps; {REMEDY}."
            )
        return stated
    k = tensors.count("k")
    if stated not in (None, k):  # that package refuses it as well
        raise RunError(
            f"{path} has k {k} in {TENSORS_FILE} and {stated} in {CONFIG_FILE}; {REMEDY}."
        )
    return k


def _linear(tensors: Tensors, bias: str, b_dec: str) -> dict[str, Tensor]:
    """Return the weights of the classes made of two linear layers."""
    W_enc = tensors.take("encoder.weight", None, None)
    n, d = W_enc.shape
    return {
        "W_enc": W_enc,
        "W_dec": tensors.take("decoder.weight", d, n).T.contiguous(),
        "b_enc": tensors.take(bias, n),
        "b_dec": tensors.take(b_dec, d),
    }


def _transposed(tensors: Tensors) -> dict[str, Tensor]:
    """Return the weights of the classes with W_enc [d, n]."""
    W_enc = tensors.take("W_enc", None, None).T.contiguous()
    n, d = W_enc.shape
    return {
        "W_enc": W_enc,
        "W_dec": tensors.take("W_dec", n, d),
        "b_enc": tensors.take("b_enc", n),
        "b_dec": tensors.take("b_dec", d),
    }


def _relu(tensors: Tensors, path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    return {"activation": "relu"}, _linear(tensors, "encoder.bias", "bias")


def _relu_uncentred(tensors: Tensors, path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    taken = _linear(tensors, "encoder.bias", "decoder.bias")
    return {"activation": "relu"}, absorb(taken, -taken["b_dec"])


def _gated(tensors: Tensors, path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    taken = _linear(tensors, "gate_bias", "decoder_bias")
    n = len(taken["b_enc"])
    taken |= {"r_mag": tensors.take("r_mag", n), "b_mag": tensors.take("mag_bias", n)}
    return {"activation": "gated"}, taken


def _jumprelu(tensors: Tensors, path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    taken = _transposed(tensors)
    taken = absorb(taken, -taken["b_dec"])
    # with a negative threshold its ReLU still cuts at 0
    taken["threshold"] = tensors.take("threshold", len(taken["b_enc"])).clamp(min=0)
    return {"activation": "jumprelu"}, taken


def _topk(tensors: Tensors, path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    tensors.drop("threshold")  # unused by default; its encode takes the k largest
    return {"activation": "topk"}, _linear(tensors, "encoder.bias", "b_dec")


def _batchtopk(tensors: Tensors, path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    taken = _linear(tensors, "encoder.bias", "b_dec")
    remedy = (
        f"set dict_class to AutoEncoderTopK in {CONFIG_FILE} to import it with the k largest "
        "latents of each row"
    )
    return _with_one_threshold(tensors, taken, path, remedy)


def _matryoshka(tensors: Tensors, path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    tensors.drop("group_sizes")  # used by its losses only; all groups are active in a loaded SAE
    remedy = (
        f"add the least activation that its batches keep, a mean over many, to {TENSORS_FILE} as "
        "threshold"
    )
    return _with_one_threshold(tensors, _transposed(tensors), path, remedy)


def _with_one_threshold(
    tensors: Tensors, taken: dict[str, Tensor], path: Path, remedy: str
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    threshold = tensors.take("threshold") if tensors.has("threshold") else torch.tensor(-1.0)
    if threshold < 0:
        raise refusal(
            str(path),
            "has no threshold, without which the latents of a row depend on the rest of its batch "
            "(training ended before threshold_start_step, or an old version saved it)",
            remedy,
        )
    taken["threshold"] = threshold.repeat(len(taken["b_enc"]))
    return {"activation": "batchtopk"}, taken


READERS = {
    "AutoEncoder": _relu,
    "AutoEncoderNew": _relu_uncentred,
    "GatedAutoEncoder": _gated,
    "AutoEncoderTopK": _topk,
    "BatchTopKSAE": _batchtopk,
    "MatryoshkaBatchTopKSAE": _matryoshka,
    "JumpReluAutoEncoder": _jumprelu,
}
