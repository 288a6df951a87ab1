"""SAELens, version 6: a folder with cfg.json and sae_weights.safetensors.

    W_enc [d, n]  W_dec [n, d_out]  b_dec [d_out]
    b_enc [n], or b_gate, b_mag and r_mag [n] of gated; threshold [n] of jumprelu

    ours                     architecture             theirs only
    relu                     standard                 apply_b_dec_to_input: whether rows are
    topk                     topk                       centred on b_dec
    jumprelu, batchtopk      jumprelu                 rescale_acts_by_decoder_norm: whether topk
    gated                    gated                      weighs latents by their decoder's norm
    relu transcoder          transcoder
    jumprelu, batchtopk tr.  jumprelu_transcoder

layer_norm has the same name there, unit_norm is constant_norm_rescale, a scale is folded. Training
checkpoints can be read as well: batchtopk and matryoshka_batchtopk have one threshold, and
expected_average_only_in has its scale in activation_scaler.json.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sae_harvest.common.atomic import new_folder
from sae_harvest.train.run.files import read_tensors, write_json, write_tensors
from sae_harvest.train.sae.formats.folding import absorb, in_model_units, rescaled
from sae_harvest.train.sae.formats.reading import (
    NOTE,
    REMEDY,
    Fields,
    Origin,
    Tensors,
    build,
    note,
    origin_fields,
    refusal,
    settings,
)
from sae_harvest.train.sae.sae import SAE

PACKAGE = "SAELens"
CONFIG_FILE, TENSORS_FILE = "cfg.json", "sae_weights.safetensors"
SCALER_FILE = "activation_scaler.json"
LAYOUT_VERSION = "6.54.12"  # version of the written layout; older versions would be converted

ARCHITECTURES = {"relu": "standard", "topk": "topk", "jumprelu": "jumprelu", "gated": "gated"}
ACTIVATIONS = {theirs: ours for ours, theirs in ARCHITECTURES.items()} | {
    "transcoder": "relu",
    "jumprelu_transcoder": "jumprelu",
    "batchtopk": "batchtopk",
    "matryoshka_batchtopk": "batchtopk",
}
NORMALIZATIONS = {
    "none": "none",
    "layer_norm": "layer_norm",
    "unit_norm": "constant_norm_rescale",
}
HOOKS = {
    "resid_pre": "hook_resid_pre",
    "attn_out": "hook_attn_out",
    "resid_mid": "hook_resid_mid",
    "mlp_act": "mlp.hook_post",
    "mlp_out": "hook_mlp_out",
    "resid_post": "hook_resid_post",
}


def hook_name(site: str) -> str:
    """Return TransformerLens's name of a site (blocks.12.hook_resid_post), or the site itself."""
    kind, _, layer = site.rpartition(".")
    return f"blocks.{layer}.{HOOKS[kind]}" if kind in HOOKS and layer.isdecimal() else site


def site_of(hook: Any) -> str | None:
    """Return the site of TransformerLens's name; None if we have no such site."""
    match = re.fullmatch(r"blocks\.([0-9]+)\.(.+)", str(hook))
    kinds = {name: kind for kind, name in HOOKS.items()}
    return f"{kinds[match[2]]}.{match[1]}" if match and match[2] in kinds else None


def write(sae: SAE, path: Path) -> None:
    """Write the folder; see `train.sae.formats.Format`."""
    config = sae.config
    activation = "jumprelu" if config.activation == "batchtopk" else config.activation
    architecture = ARCHITECTURES[activation]
    if config.is_transcoder:
        if activation not in ("relu", "jumprelu"):
            raise refusal(
                PACKAGE,
                f"has transcoders with relu, jumprelu and batchtopk, got {config.activation}",
                "export it as sparsify" if activation == "topk" else "train one of those",
            )
        architecture = "transcoder" if activation == "relu" else "jumprelu_transcoder"
    tensors = in_model_units(sae)
    state = {
        "W_enc": tensors["W_enc"].T.contiguous(),  # [d_in, n_latents]
        "W_dec": tensors["W_dec"],
        "b_dec": tensors["b_dec"],
        "b_gate" if activation == "gated" else "b_enc": tensors["b_enc"],
    }
    state |= {name: tensors[name] for name in ("threshold", "b_mag", "r_mag") if name in tensors}
    fields: dict[str, Any] = {
        "architecture": architecture,
        "d_in": config.d_in,
        "d_sae": config.n_latents,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": not config.is_transcoder,
        "normalize_activations": NORMALIZATIONS.get(config.normalization, "none"),
        "reshape_activations": "none",
        "metadata": _metadata(sae),
    }
    if activation == "topk":
        fields |= {"k": config.k, "rescale_acts_by_decoder_norm": False}
    if config.is_transcoder:
        fields["d_out"] = config.d_out
    new_folder(path)
    write_tensors(path / TENSORS_FILE, state)
    write_json(path / CONFIG_FILE, fields)


def _metadata(sae: SAE) -> dict[str, Any]:
    config = sae.config
    metadata: dict[str, Any] = {
        "sae_lens_version": LAYOUT_VERSION,
        "model_name": config.model or None,
        "hook_name": hook_name(config.site),
        NOTE: note(sae),
    }
    if config.target_site is not None:
        metadata["hook_name_out"] = hook_name(config.target_site)
    return metadata


def read(path: Path, given: Origin) -> SAE:
    """Return the SAE in the folder; see `train.sae.formats.Format`."""
    fields = settings(path, CONFIG_FILE, PACKAGE)
    metadata = fields.get("metadata", dict, {})
    version = str(metadata.get("sae_lens_version") or fields.values.get("sae_lens_version") or "")
    if not re.match(r"[6-9]\.|[1-9]\d", version):
        raise refusal(
            str(path),
            f"is of {PACKAGE} {ascii(version[:20]) if version else 'before version 6'}",
            f"load and save it with {PACKAGE} 6",
        )
    architecture = fields.need("architecture", str)
    if architecture not in ACTIVATIONS:
        raise refusal(
            str(path),
            f"has the architecture {architecture!a:.60}, which ours cannot be",
            f"import one of {', '.join(ACTIVATIONS)}",
        )
    if fields.get("reshape_activations", str, "none") != "none":
        raise refusal(
            str(path),
            "reads the values of attention heads, which is not one of our sites",
            "import an SAE of another hook",
        )
    transcoder = architecture.endswith("transcoder")
    shape = {"activation": ACTIVATIONS[architecture]} | _normalization(path, fields, transcoder)
    if shape["activation"] == "topk":
        shape["k"] = fields.need("k", int)
    if shape["activation"] == "batchtopk":  # a mean, perhaps not an integer
        shape["k"] = max(1, round(fields.need("k", (int, float))))
    taken = _tensors(path, fields, shape["activation"], transcoder)
    if transcoder:
        shape["d_out"] = taken["W_dec"].shape[1]
    found = {
        "model": metadata.get("model_name"),
        "site": site_of(metadata.get("hook_name")),
        "target_site": site_of(metadata.get("hook_name_out")),
    }
    found |= noted if isinstance(noted := metadata.get(NOTE), dict) else {}
    return build(path, shape | origin_fields(path, given, found, transcoder), taken)


def _normalization(path: Path, fields: Fields, transcoder: bool) -> dict[str, Any]:
    theirs = fields.get("normalize_activations", str, "none")
    ours = {name: mine for mine, name in NORMALIZATIONS.items()}
    if theirs in ours and not (transcoder and theirs != "none"):
        return {"normalization": ours[theirs]}
    if theirs == "expected_average_only_in" and (path / SCALER_FILE).is_file():
        scaler = Fields(path / SCALER_FILE, f"The scaler of {PACKAGE}")
        factor = float(scaler.need("scaling_factor", (int, float)))
        if factor > 0:
            return {"normalization": "scale", "input_scale": 1 / factor}
    raise refusal(
        str(path),
        f"normalises its activations by {theirs!a:.60}, which ours cannot",
        f"save it with {PACKAGE} after training has folded that into the weights",
    )


def _tensors(path: Path, fields: Fields, activation: str, transcoder: bool) -> dict[str, Tensor]:
    """Return the tensors by our names, for rows centred on b_dec (not for transcoders)."""
    file = path / TENSORS_FILE
    tensors = Tensors(read_tensors(file, f"The SAE of {PACKAGE}", REMEDY), file)
    W_enc = tensors.take("W_enc", fields.need("d_in", int), fields.need("d_sae", int))
    d, n = W_enc.shape
    width_out = fields.need("d_out", int) if transcoder else d
    taken = {
        "W_enc": W_enc.T.contiguous(),
        "W_dec": tensors.take("W_dec", n, width_out),
        "b_enc": tensors.take("b_gate" if activation == "gated" else "b_enc", n),
        "b_dec": tensors.take("b_dec", width_out),
    }
    if activation == "gated":
        taken |= {name: tensors.take(name, n) for name in ("r_mag", "b_mag")}
    if activation == "jumprelu":
        # with a negative threshold its ReLU still cuts at 0
        taken["threshold"] = tensors.take("threshold", n).clamp(min=0)
    if activation == "batchtopk":
        taken["threshold"] = tensors.take("topk_threshold").clamp(min=0).repeat(n)
    tensors.finish()
    if fields.get("rescale_acts_by_decoder_norm", bool, False):
        taken = rescaled(taken)
    if transcoder:
        taken["b_in"] = torch.zeros(d)
    elif not fields.get("apply_b_dec_to_input", bool, True):
        taken = absorb(taken, -taken["b_dec"])
    return taken
