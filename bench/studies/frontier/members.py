"""The SAEs of the study: what is trained, and the dictionaries beside them that know nothing."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from sae_harvest.pipelines.evaluate.baselines import CHANNELS, PCA, RANDOM
from sae_harvest.train.config import TrainConfig

N_LATENTS = 2304  # four times the width of SmolLM2-135M
KS = (8, 16, 32, 64, 128)
SEEDS = (0, 1, 2)
BATCH_ROWS = 2048  # half of the default, for twice as many steps
# Penalties were chosen, with seed 0, so that the L0 of the five points spans that of the others.
L1 = {
    "relu_l1": (0.35, 0.2, 0.12, 0.07, 0.04),
    "gated": (0.45, 0.3, 0.18, 0.1, 0.06),
}
WITH_K = ("topk", "batchtopk", "jumprelu", "relu_kl")
BASELINES = (RANDOM, PCA, CHANNELS)
BASELINES_OF = "topk"  # whose rows have the norms of the random directions


@dataclass(frozen=True)
class Point:
    """An activation function at one sparsity."""

    family: str
    """Name of the activation function, or of a baseline."""
    setting: str
    """The setting that makes it sparse, and its value."""
    names: tuple[str, ...]
    """Names of its dictionaries, one for each seed."""

    @property
    def title(self) -> str:
        """A name for tables."""
        return re.sub(r"^(k|l1)", rf"{self.family}, \1 ", self.setting)

    @property
    def key(self) -> str:
        """A name for files."""
        return f"{self.family.replace(' ', '-')}-{self.setting}"


def points() -> Iterator[tuple[Point, Mapping[str, Any]]]:
    """Yield each point that is trained, with its settings."""
    for family in (*WITH_K, *L1):
        of, values = ("l1", L1[family]) if family in L1 else ("k", KS)
        for value in values:
            setting = f"{of}{value:g}"
            names = tuple(f"{family}-{setting}-seed{seed}" for seed in SEEDS)
            yield Point(family, setting, names), {"activation": family, of: value}


def baseline_points() -> Iterator[tuple[Point, int]]:
    """Yield each point of a baseline, with its number of active latents per row."""
    for family in BASELINES:
        for k in KS:
            yield Point(family, f"k{k}", (f"{family}-k{k}",)), k


def members(tokens: int) -> dict[str, TrainConfig]:
    """Return the runs of the sweep by name.

    Args:
        tokens: rows that each SAE trains on.
    """
    # Seeds change the weights only: all read the same batches in the same order.
    shared: dict[str, Any] = {
        "n_latents": N_LATENTS,
        "tokens": tokens,
        "batch_rows": BATCH_ROWS,
        "order_seed": 0,
    }
    return {
        name: TrainConfig.model_validate(shared | dict(settings) | {"seed": seed})
        for point, settings in points()
        for seed, name in zip(SEEDS, point.names, strict=True)
    }
