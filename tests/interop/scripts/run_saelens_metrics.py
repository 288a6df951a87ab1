"""Run with sae-lens: python run_saelens_metrics.py WORK _.

Reads WORK/model (transformers), WORK/tokens.safetensors and WORK/ours/CASE/sae; writes metrics.json
beside each sae: what SAELens's own evaluation says, in several settings.
"""

import json
import sys
from pathlib import Path

import torch
from datasets import Dataset
from sae_lens import SAE
from sae_lens.evals import get_eval_everything_config, get_recons_loss, run_evals
from sae_lens.load_model import load_model
from sae_lens.training.activation_scaler import ActivationScaler
from sae_lens.training.activations_store import ActivationsStore
from safetensors.torch import load_file

HOOK = "transformer.h.1"  # resid_post.1 of GPT-2, by transformers' name of the module
work = Path(sys.argv[1])
tokens = load_file(work / "tokens.safetensors")["tokens"]  # [contexts, length]
model = load_model("AutoModelForCausalLM", str(work / "model"), "cpu")


def evaluate(sae, batches, exclude_special_tokens):
    store = ActivationsStore(
        model=model,
        dataset=Dataset.from_dict({"tokens": tokens.tolist()}),
        streaming=False,
        hook_name=HOOK,
        hook_head_index=None,
        context_size=tokens.shape[1],
        d_in=sae.cfg.d_in,
        n_batches_in_buffer=2,
        total_training_tokens=1,
        store_batch_size_prompts=len(tokens) // batches,
        train_batch_size_tokens=1,
        prepend_bos=False,
        normalize_activations="none",
        device=torch.device("cpu"),
        dtype="float32",
    )
    config = get_eval_everything_config(len(tokens) // batches, batches, batches)
    found, _ = run_evals(
        sae,
        store,
        model,
        ActivationScaler(),
        config,
        exclude_special_tokens=exclude_special_tokens,
    )
    return {name: value for group in found.values() for name, value in group.items()}


for folder in (work / "ours").iterdir():
    sae = SAE.load_from_disk(folder / "sae")
    sae.cfg.metadata.hook_name = HOOK
    results = {
        "one batch": evaluate(sae, 1, False),
        "four batches": evaluate(sae, 4, False),
        "without special tokens": evaluate(sae, 1, True),
    }
    per_token = get_recons_loss(sae, model, ActivationScaler(), tokens, True, True)
    kl = per_token["kl_div_with_sae"][:, :-1]  # the last position predicts no token of the context
    results["one batch"]["kl_of_predicted_tokens"] = kl.mean().item()
    (folder / "metrics.json").write_text(json.dumps(results))
