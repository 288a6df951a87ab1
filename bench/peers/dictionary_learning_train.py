"""Trains dictionary_learning's TopKTrainer on the rows of `bench.quality`, by its own interpreter.

    PEER/bin/python bench/peers/dictionary_learning_train.py FOLDER N_LATENTS K SEED RECIPE OUT

Its warm-up of 1,000 steps is refused by its own schedule for shorter runs; it is a twentieth of
the run here. RECIPE is one of

    default   Adam at 2e-4 / sqrt(n_latents / 2^14), constant after the warm-up; AuxK from 10 M
              rows without firing; inputs as they are
    scaled    the same with inputs scaled to mean squared norm 1 and the learning rate falling
              over the last fifth, as in its demonstration
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["WANDB_MODE"] = "disabled"

from dictionary_learning.trainers.top_k import AutoEncoderTopK, TopKTrainer
from dictionary_learning.training import trainSAE
from training_rows import Clock, arguments, save


def main() -> None:
    rows, n_latents, k, recipe, out, seed = arguments()
    config = {
        "trainer": TopKTrainer,
        "steps": rows.steps,
        "activation_dim": rows.width,
        "dict_size": n_latents,
        "k": k,
        "layer": 12,
        "lm_name": "SmolLM2-135M",
        "device": "cpu",
        "seed": seed,
        "warmup_steps": rows.steps // 20,
    }
    scaled = recipe == "scaled"
    if scaled:
        config["decay_start"] = rows.steps - rows.steps // 5
    with tempfile.TemporaryDirectory() as folder:
        clock = Clock()
        trainSAE(
            data=rows,
            trainer_configs=[config],
            steps=rows.steps,
            save_dir=folder,
            normalize_activations=scaled,
            device="cpu",
        )
        seconds = clock.per_step(rows.steps)
        coder = AutoEncoderTopK.from_pretrained(Path(folder) / "trainer_0" / "ae.pt")
    save(
        out,
        rows,
        seconds,
        coder.forward,
        W_enc=coder.encoder.weight,
        b_enc=coder.encoder.bias,
        W_dec=coder.decoder.weight.T,
        b_dec=coder.b_dec,
    )


if __name__ == "__main__":
    main()
