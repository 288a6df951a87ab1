"""Trains eai-sparsify's Trainer on the rows of `bench.quality`, run by its own interpreter.

    PEER/bin/python bench/peers/sparsify_train.py FOLDER N_LATENTS K SEED RECIPE OUT

Its Trainer wants a model and a data set of tokens. Here a token is a number of a row, and the
model's only layer looks it up. RECIPE is one of

    default   schedule-free signum, 5e-3 / sqrt(n_latents / 2^14), no AuxK
    adam      its other optimiser: Adam, 2e-4 / sqrt(n_latents / 2^14), linear decay, with the
              warm-up of 1,000 steps cut to a twentieth of the run
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from types import SimpleNamespace

import torch
from sparsify import SparseCoder, SparseCoderConfig, TrainConfig, Trainer
from torch import nn
from training_rows import Clock, TrainingRows, arguments, save

os.environ["WANDB_MODE"] = "disabled"


class Tokens:
    """A data set of one context per step; its tokens are row numbers."""

    def __init__(self, rows: TrainingRows) -> None:
        self._order = torch.from_numpy(rows.order)

    def __len__(self) -> int:
        return len(self._order)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self._order[index]}


class Lookup(nn.Module):
    def __init__(self, rows: TrainingRows) -> None:
        super().__init__()
        self._rows = rows.rows

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        found = self._rows[tokens.flatten().numpy()]
        return torch.from_numpy(found).float().unflatten(0, tokens.shape)


class Model(nn.Module):
    """As much of a language model as the Trainer asks for."""

    device = torch.device("cpu")
    config = SimpleNamespace(num_hidden_layers=1)

    def __init__(self, rows: TrainingRows) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Lookup(rows)])
        self.dummy_inputs = {"input_ids": torch.zeros(1, 1, dtype=torch.int64)}

    @property
    def base_model(self) -> Model:
        return self

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.layers[0](input_ids)


def main() -> None:
    rows, n_latents, k, recipe, out, seed = arguments()
    settings = {
        "default": {},
        "adam": {"optimizer": "adam", "lr_warmup_steps": rows.steps // 20},
    }[recipe]
    with tempfile.TemporaryDirectory() as folder:
        config = TrainConfig(
            SparseCoderConfig(num_latents=n_latents, k=k),
            batch_size=1,
            init_seeds=[seed],
            log_to_wandb=False,
            save_dir=folder,
            run_name="run",
            **settings,
        )
        trainer = Trainer(config, Tokens(rows), Model(rows))
        clock = Clock()
        trainer.fit()
        seconds = clock.per_step(rows.steps)
        # what it saves is the schedule-free average; the module itself is between two of them
        coder = SparseCoder.load_from_disk(Path(folder) / "run" / "layers.0")
    save(
        out,
        rows,
        seconds,
        lambda x: coder(x).sae_out,
        W_enc=coder.encoder.weight,
        b_enc=coder.encoder.bias,
        W_dec=coder.W_dec,
        b_dec=coder.b_dec,
    )


if __name__ == "__main__":
    main()
