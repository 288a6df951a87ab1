"""Run with sae-lens: python run_saelens.py WORK _."""

import sys
from pathlib import Path

import torch
from sae_lens import SAE
from sae_lens.saes import (
    BatchTopKTrainingSAE,
    BatchTopKTrainingSAEConfig,
    GatedSAE,
    GatedSAEConfig,
    JumpReLUSAE,
    JumpReLUSAEConfig,
    JumpReLUTranscoder,
    JumpReLUTranscoderConfig,
    StandardSAE,
    StandardSAEConfig,
    TopKSAE,
    TopKSAEConfig,
    TopKTrainingSAE,
    TopKTrainingSAEConfig,
    Transcoder,
    TranscoderConfig,
)
from safetensors.torch import load_file, save_file

work = Path(sys.argv[1])
x = load_file(work / "rows.safetensors")["x"]
shape = {"d_in": x.shape[1], "d_sae": 64}


@torch.no_grad()
def save_outputs(sae, folder):
    latents = sae.encode(x)
    tensors = {"latents": latents, "reconstruction": sae.decode(latents)}
    save_file({name: t.contiguous() for name, t in tensors.items()}, folder / "out.safetensors")


def randomise(sae):
    with torch.no_grad():
        for name, parameter in sae.named_parameters():
            torch.nn.init.normal_(parameter)
            if name == "threshold":
                parameter[::2].abs_()  # the others, below 0, let every positive number through


for folder in (work / "ours").iterdir():
    save_outputs(SAE.load_from_disk(folder / "sae"), folder)

torch.manual_seed(0)
for case, kind, config in (
    ("standard", StandardSAE, StandardSAEConfig(**shape)),
    ("standard-uncentred", StandardSAE, StandardSAEConfig(**shape, apply_b_dec_to_input=False)),
    ("topk", TopKSAE, TopKSAEConfig(**shape, k=8, normalize_activations="layer_norm")),
    ("topk-rescaled", TopKSAE, TopKSAEConfig(**shape, k=8, rescale_acts_by_decoder_norm=True)),
    (
        "topk-norm",
        TopKSAE,
        TopKSAEConfig(**shape, k=8, normalize_activations="constant_norm_rescale"),
    ),
    ("jumprelu", JumpReLUSAE, JumpReLUSAEConfig(**shape)),
    ("gated", GatedSAE, GatedSAEConfig(**shape)),
    (
        "gated-uncentred",
        GatedSAE,
        GatedSAEConfig(**shape, apply_b_dec_to_input=False, normalize_activations="layer_norm"),
    ),
    (
        "transcoder",
        Transcoder,
        TranscoderConfig(**shape, d_out=24, apply_b_dec_to_input=False),
    ),
    (
        "jumprelu-transcoder",
        JumpReLUTranscoder,
        JumpReLUTranscoderConfig(**shape, d_out=24, apply_b_dec_to_input=False),
    ),
):
    sae = kind(config)
    sae.cfg.metadata.hook_name = "blocks.7.hook_mlp_out"
    sae.cfg.metadata.model_name = "gpt2"
    randomise(sae)
    folder = work / "theirs" / case
    sae.save_model(folder / "sae")
    save_outputs(sae, folder)

# checkpoints of training, and what is saved at its end
for case, kind, config in (
    ("training-topk", TopKTrainingSAE, TopKTrainingSAEConfig(**shape, k=8)),
    ("training-batchtopk", BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig(**shape, k=8.4)),
):
    sae = kind(config)
    randomise(sae)
    if case == "training-batchtopk":
        sae.topk_threshold.fill_(1.3)
    end = work / "theirs" / f"{case}-end"
    sae.save_inference_model(end / "sae")
    inference = SAE.load_from_disk(end / "sae")
    folder = work / "theirs" / case
    sae.save_model(folder / "sae")
    save_outputs(inference, end)
    save_outputs(inference, folder)
