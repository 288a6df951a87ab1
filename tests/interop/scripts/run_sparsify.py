"""Run with eai-sparsify: python run_sparsify.py WORK _."""

import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from sparsify import SparseCoder, SparseCoderConfig

work = Path(sys.argv[1])
x = load_file(work / "rows.safetensors")["x"]


@torch.no_grad()
def save_outputs(sae, folder):
    values, indices, _ = sae.encode(x)
    latents = torch.zeros(len(x), sae.num_latents).scatter(1, indices, values)
    tensors = {"latents": latents, "reconstruction": sae(x).sae_out}
    save_file({name: t.contiguous() for name, t in tensors.items()}, folder / "out.safetensors")


for folder in (work / "ours").iterdir():
    save_outputs(SparseCoder.load_from_disk(folder / "sae"), folder)

torch.manual_seed(0)
for case, config in (
    ("topk", SparseCoderConfig(num_latents=64, k=8)),
    ("expansion", SparseCoderConfig(expansion_factor=4, k=8, normalize_decoder=False)),
    ("transcoder", SparseCoderConfig(num_latents=64, k=8, transcode=True)),
):
    sae = SparseCoder(x.shape[1], config)
    for parameter in sae.parameters():
        torch.nn.init.normal_(parameter)
    folder = work / "theirs" / case
    sae.save_to_disk(folder / "sae")
    save_outputs(sae, folder)
