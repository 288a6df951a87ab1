"""Trains SAELens's SAETrainer on the rows of `bench.quality`, run by its own interpreter.

    PEER/bin/python bench/peers/saelens_train.py FOLDER N_LATENTS K SEED RECIPE OUT

RECIPE is one of

    default   Adam at 3e-4, constant; inputs as they are; AuxK from 1,000 steps without firing
    scaled    the same with AuxK from a tenth of the run without firing, the learning rate
              falling over the last fifth, and inputs scaled to mean norm sqrt(d_in)
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from itertools import chain, islice

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["WANDB_MODE"] = "disabled"

import torch
from sae_lens import TopKTrainingSAE, TopKTrainingSAEConfig
from sae_lens.config import SAETrainerConfig
from sae_lens.training.sae_trainer import SAETrainer
from training_rows import Clock, arguments, save

NORM_BATCHES = 20


def main() -> None:
    rows, n_latents, k, recipe, out, _ = arguments()
    shape = {"d_in": rows.width, "d_sae": n_latents, "k": k}
    total = {
        "total_training_samples": rows.steps * rows.batch_rows,
        "train_batch_size_samples": rows.batch_rows,
    }
    batches: Iterator[torch.Tensor] = iter(rows)
    if recipe == "default":
        sae = TopKTrainingSAE(TopKTrainingSAEConfig(**shape))
        config = SAETrainerConfig(**total, lr_end=3e-5)  # a tenth of lr, as its runner sets it
    else:
        normalize = "expected_average_only_in"
        sae = TopKTrainingSAE(TopKTrainingSAEConfig(**shape, normalize_activations=normalize))
        config = SAETrainerConfig(
            **total,
            lr_end=3e-5,
            lr_decay_steps=rows.steps // 5,
            dead_feature_window=rows.steps // 10,
            n_batches_for_norm_estimate=NORM_BATCHES,
        )
        batches = chain(islice(iter(rows), NORM_BATCHES), batches)  # the first measure the norm
    trainer = SAETrainer(config, sae, batches)
    clock = Clock()
    trainer.fit()
    seconds = clock.per_step(rows.steps)
    sae.eval()
    sae.fold_W_dec_norm()  # its choice of latents counts the length of decoder rows
    save(
        out,
        rows,
        seconds,
        sae.forward,
        W_enc=sae.W_enc.T,
        b_enc=sae.b_enc,
        W_dec=sae.W_dec,
        b_dec=sae.b_dec,
    )


if __name__ == "__main__":
    main()
