"""What the peers' training scripts share: the rows of `bench.quality`, and where weights go.

FOLDER, written by `bench.quality`, holds

    rows.npy         float16 or float32 [rows, d_in], every row that may be trained on
    order-SEED.npy   int64 [steps, batch_rows], which of them each step takes

Every peer is given exactly these batches, in this order.
"""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch

CHECK_ROWS = 512


class TrainingRows:
    """Batches of one run: float32 [batch_rows, d_in], in the order of `seed`."""

    def __init__(self, folder: str | Path, seed: int) -> None:
        self.rows = np.load(Path(folder) / "rows.npy", mmap_mode="r")
        self.order = np.load(Path(folder) / f"order-{seed}.npy")

    @property
    def steps(self) -> int:
        return len(self.order)

    @property
    def batch_rows(self) -> int:
        return self.order.shape[1]

    @property
    def width(self) -> int:
        return self.rows.shape[1]

    def batch(self, step: int) -> torch.Tensor:
        return torch.from_numpy(self.rows[self.order[step]].astype(np.float32))

    def __iter__(self) -> Iterator[torch.Tensor]:
        return (self.batch(step) for step in range(self.steps))


class Clock:
    """CPU and wall seconds since it was made."""

    def __init__(self) -> None:
        self._cpu, self._wall = _cpu_seconds(), time.perf_counter()

    def per_step(self, steps: int) -> dict[str, float]:
        cpu, wall = _cpu_seconds() - self._cpu, time.perf_counter() - self._wall
        return {"cpu": cpu / steps, "wall": wall / steps}


def save(
    out: str,
    rows: TrainingRows,
    seconds: dict[str, float],
    reconstruct: Callable[[torch.Tensor], torch.Tensor],
    **weights: torch.Tensor,
) -> None:
    """Weights as `latents = TopK(ReLU(W_enc (x - b_dec) + b_enc))`, both [n_latents, d_in].

    With them go CPU and wall seconds a step, and what the peer itself makes of a few rows, so
    that the judge can tell whether it has understood the weights.
    """
    x = rows.batch(0)[:CHECK_ROWS]
    with torch.no_grad():
        check = reconstruct(x)
    arrays = {name: tensor.detach().float().numpy() for name, tensor in weights.items()}
    arrays |= {"check_x": x.numpy(), "check_x_hat": check.float().numpy()}
    unfinished = Path(out).with_suffix(".unfinished.npz")
    np.savez(unfinished, **seconds, **arrays)
    unfinished.rename(out)


def arguments() -> tuple[TrainingRows, int, int, str, str, int]:
    """rows, n_latents, k, recipe, out, seed from the command line.

    PEER/bin/python bench/peers/NAME_train.py FOLDER N_LATENTS K SEED RECIPE OUT
    """
    folder, n_latents, k, seed, recipe, out = sys.argv[1:]
    torch.manual_seed(int(seed))
    return TrainingRows(folder, int(seed)), int(n_latents), int(k), recipe, out, int(seed)


def _cpu_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime
