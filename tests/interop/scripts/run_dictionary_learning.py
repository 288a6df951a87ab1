"""Run with dictionary-learning: python run_dictionary_learning.py WORK _."""

import json
import sys
from pathlib import Path

import torch
from dictionary_learning.dictionary import (
    AutoEncoder,
    AutoEncoderNew,
    GatedAutoEncoder,
    JumpReluAutoEncoder,
)
from dictionary_learning.trainers.batch_top_k import BatchTopKSAE
from dictionary_learning.trainers.matryoshka_batch_top_k import MatryoshkaBatchTopKSAE
from dictionary_learning.trainers.top_k import AutoEncoderTopK
from dictionary_learning.utils import load_dictionary
from safetensors.torch import load_file, save_file

work = Path(sys.argv[1])
x = load_file(work / "rows.safetensors")["x"]
d, n = x.shape[1], 64


@torch.no_grad()
def save_outputs(sae, folder):
    latents = sae.encode(x)
    tensors = {"latents": latents, "reconstruction": sae.decode(latents)}
    save_file({name: t.contiguous() for name, t in tensors.items()}, folder / "out.safetensors")


for folder in (work / "ours").iterdir():
    sae, config = load_dictionary(str(folder / "sae"), device="cpu")
    if isinstance(sae, AutoEncoder):  # unless told not to, it scales the decoder's rows to norm 1
        sae = AutoEncoder.from_pretrained(folder / "sae" / "ae.pt", normalize_decoder=False)
    save_outputs(sae, folder)

torch.manual_seed(0)
for sae in (
    AutoEncoder(d, n),
    AutoEncoderNew(d, n),
    GatedAutoEncoder(d, n),
    JumpReluAutoEncoder(d, n),
    AutoEncoderTopK(d, n, 8),
    BatchTopKSAE(d, n, 8),
    MatryoshkaBatchTopKSAE(d, n, 8, [16, 48]),
):
    with torch.no_grad():
        for name, parameter in sae.named_parameters():
            torch.nn.init.normal_(parameter)
            if name == "threshold":
                parameter[::2].abs_()  # the others, below 0, let every positive number through
    if isinstance(sae, BatchTopKSAE | MatryoshkaBatchTopKSAE):
        sae.threshold.fill_(0.9)
    case = type(sae).__name__
    folder = work / "theirs" / case
    (folder / "sae").mkdir(parents=True)
    torch.save(sae.state_dict(), folder / "sae" / "ae.pt")
    trainer = {"dict_class": case, "k": 8, "layer": 3, "lm_name": "gpt2", "submodule_name": "x"}
    (folder / "sae" / "config.json").write_text(json.dumps({"trainer": trainer}))
    save_outputs(sae, folder)
