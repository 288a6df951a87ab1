"""Run beside a clone of OpenAI's sparse_autoencoder: python run_openai.py WORK CLONE."""

import importlib.util
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

work, clone = map(Path, sys.argv[1:])
spec = importlib.util.spec_from_file_location("model", clone / "sparse_autoencoder" / "model.py")
model = importlib.util.module_from_spec(spec)
spec.loader.exec_module(model)
x = load_file(work / "rows.safetensors")["x"]


@torch.no_grad()
def save_outputs(sae, folder):
    latents, info = sae.encode(x)
    tensors = {"latents": latents, "reconstruction": sae.decode(latents, info)}
    save_file({name: t.contiguous() for name, t in tensors.items()}, folder / "out.safetensors")


for folder in (work / "ours").iterdir():
    save_outputs(model.Autoencoder.from_state_dict(torch.load(folder / "sae")), folder)

torch.manual_seed(0)
for case, activation, normalize in (
    ("topk", model.TopK(8), True),
    ("relu", torch.nn.ReLU(), False),
):
    sae = model.Autoencoder(64, x.shape[1], activation, normalize=normalize)
    torch.nn.init.normal_(sae.pre_bias)
    torch.nn.init.normal_(sae.latent_bias)
    folder = work / "theirs" / case
    folder.mkdir(parents=True)
    torch.save(sae.state_dict(), folder / "sae")
    save_outputs(sae, folder)
