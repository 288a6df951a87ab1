"""How many of the exact k largest latents low precision finds, and what those it misses are worth.

python -m bench.recall                              rows and a dictionary made at random
python -m bench.recall --store PLACE --sae FOLDER   held-out rows of a store, a trained SAE

Candidates are the k + margin latents with the largest low-precision pre-activations; exact values
of those decide. Exact here is float64. The kernels' own margin is marked.
"""

from __future__ import annotations

from dataclasses import dataclass

import click
import numpy as np
import torch
from rich.table import Table
from torch import Tensor

from sae_harvest.common.console import output
from sae_harvest.store.reader import ActivationStore
from sae_harvest.store.rules import RowRule
from sae_harvest.train.sae.kernels import Kernels
from sae_harvest.train.sae.kernels.cpu import CpuKernels
from sae_harvest.train.sae.kernels.torch_ops import TorchKernels
from sae_harvest.train.sae.sae import SAE

ROWS, STEP = 2048, 512
MARGINS = (0, 2, 4, 8, 16)
D_IN, N_LATENTS, K = 768, 24_576, 32
LARGE = {3: 50.0, 400: 20.0}  # dimensions of the made-up rows that are so many times as large


@dataclass(frozen=True)
class Encoder:
    """float32 rows as the encoder sees them [rows, d_in], its weights [n_latents, d_in], biases.

    decoder: float32 [n_latents, d_in], of a trained SAE.
    """

    centred: Tensor
    weight: Tensor
    bias: Tensor
    k: int
    decoder: Tensor | None = None


@dataclass(frozen=True)
class Recall:
    """found: share of the exact k largest; lost: share of their squares that is not found;
    fvu: what that adds to the fraction of variance unexplained, none without a decoder."""

    found: float
    lost: float
    fvu: float | None


def recall(encoder: Encoder, kernels: Kernels, margin: int) -> Recall:
    """What a choice of k + margin candidates finds."""
    low = kernels.low_precision(encoder.weight)
    weight = encoder.weight.double()
    found = squares = lost = 0.0
    errors = [0.0, 0.0]  # squared, by what was found and by the exact k largest
    for x in encoder.centred.split(STEP):
        count = min(len(weight), encoder.k + margin)
        chosen = kernels.choose(x, low, encoder.bias, count).long()  # [step, count]
        pi = x.double() @ weight.T + encoder.bias  # [step, n_latents]
        best = pi.topk(encoder.k, dim=1)
        there = torch.zeros_like(pi, dtype=torch.bool).scatter_(1, chosen, True)
        hit = there.gather(1, best.indices)  # [step, k]
        square = best.values.clamp(min=0).square()
        found += float(hit.sum())
        squares += float(square.sum())
        lost += float((square * ~hit).sum())
        if encoder.decoder is not None:
            ours = pi.where(there, -torch.inf).topk(encoder.k, dim=1)
            for i, top in enumerate((ours, best)):
                dense = torch.zeros_like(pi).scatter_(1, top.indices, top.values.clamp(min=0))
                errors[i] += float((dense @ encoder.decoder.double() - x).square().sum())
    rows = encoder.centred.double()
    variance = float((rows - rows.mean(0)).square().sum())
    return Recall(
        found / (len(rows) * encoder.k),
        lost / squares,
        None if encoder.decoder is None else (errors[0] - errors[1]) / variance,
    )


def made_up() -> tuple[Tensor, Tensor]:
    """Rows with falling variances and two far larger dimensions, and random unit rows."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(ROWS, D_IN, generator=generator) * torch.arange(1, D_IN + 1) ** -0.25
    for dimension, times in LARGE.items():
        rows[:, dimension] *= times
    return rows, random_dictionary(D_IN)


def random_dictionary(d_in: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.nn.functional.normalize(torch.randn(N_LATENTS, d_in, generator=generator))


def stored(store: ActivationStore, sae: SAE) -> Tensor:
    """Held-out rows as the SAE's encoder sees them, spread over the store."""
    rule = RowRule(
        max_norm_medians=sae.config.rule.max_norm_medians,
        heldout_fraction=sae.config.rule.heldout_fraction,
        split="heldout",
    )
    rows = np.flatnonzero(store.selected(sae.config.site, rule))
    rows = rows[np.linspace(0, len(rows) - 1, min(ROWS, len(rows))).astype(np.int64)]
    x = np.concatenate([store.read(sae.config.site, int(row), int(row) + 1) for row in rows])
    return sae.centre(torch.from_numpy(x))


@click.command(help=(__doc__ or "").splitlines()[0])
@click.option("--store", metavar="PLACE", help="The activation store.")
@click.option("--sae", metavar="FOLDER", help="A trained SAE of one of its sites.")
def main(store: str | None, sae: str | None) -> None:
    if (store is None) != (sae is None):
        raise click.UsageError("Give both --store and --sae, or neither.")
    encoders: dict[str, Encoder] = {}
    if store is not None and sae is not None:
        trained = SAE.load(sae)
        rows, k = stored(ActivationStore.open(store), trained), trained.config.k or K
        encoders[f"trained, {trained.config.n_latents:,} latents"] = Encoder(
            rows, trained.W_enc, trained.b_enc, k, trained.W_dec
        )
        weight = random_dictionary(rows.shape[1])
    else:
        rows, weight = made_up()
        k = K
    encoders[f"random, {N_LATENTS:,} latents"] = Encoder(rows, weight, torch.zeros(len(weight)), k)
    table = Table("dictionary", "numbers", "margin", "found", "squares lost", "FVU added", box=None)
    kinds: dict[str, Kernels] = {"int8": CpuKernels(), "bfloat16": TorchKernels()}
    for name, encoder in encoders.items():
        for numbers, kernels in kinds.items():
            own = kernels.low_precision(encoder.weight).candidates(encoder.k) - encoder.k
            for margin in sorted({*MARGINS, own}):
                got = recall(encoder, kernels, margin)
                table.add_row(
                    name,
                    numbers,
                    f"{margin}{' *' if margin == own else ''}",
                    f"{got.found:.6f}",
                    f"{got.lost:.1e}",
                    "" if got.fvu is None else f"{got.fvu:.1e}",
                )
    output().print(f"{len(rows):,} rows of {rows.shape[1]} dimensions, k {k}")
    output().print(table)


if __name__ == "__main__":
    main()
