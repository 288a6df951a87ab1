"""What `train-sae plan` predicts against what steps take: seconds and memory at several shapes.

    python -m bench.plan

Each shape is trained for a few steps in a process of its own, which also measures the machine's
rates just before and just after, so that neighbours slow prediction and step alike.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from rich.table import Table

from bench.measurement import Measurement, peak_bytes, seconds
from sae_harvest.common.console import output
from sae_harvest.train.config import TrainConfig
from sae_harvest.train.planning.count import memory, shape_of
from sae_harvest.train.planning.estimate import Rates, step_seconds
from sae_harvest.train.planning.measure import measure_rates
from sae_harvest.train.step.learner import Learner

# n_latents, k, d_in, batch_rows
SHAPES = (
    (4096, 32, 576, 4096),
    (16384, 32, 576, 4096),
    (24576, 32, 768, 4096),
    (8192, 64, 1024, 2048),
    (32768, 16, 512, 2048),
)
STEPS = 6
SMALL_LATENTS, SMALL_ROWS = 256, 64  # a learner whose memory doesn't matter
GOAL, FLOOR = 1.25, 1.6  # how far a prediction is off, as a ratio


def compare() -> list[dict[str, Any]]:
    """Predicted and measured seconds and bytes of each shape."""
    found = []
    for shape in SHAPES:
        command = [sys.executable, "-m", "bench.plan", *map(str, shape)]
        printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        found.append(json.loads(printed.splitlines()[-1]))
    return found


def measure(folder: Path) -> list[Measurement]:
    """plan_seconds and plan_memory: the prediction that is furthest off; nothing of `folder`."""
    found = compare()
    output().print(table(found))
    return [
        Measurement(
            f"plan_{what}",
            max(max(_ratio(row, what), 1 / _ratio(row, what)) for row in found),
            1.0,
            "times off",
            GOAL,
            FLOOR,
            higher_is_better=False,
        )
        for what in ("seconds", "memory")
    ]


def _ratio(row: dict[str, Any], what: str) -> float:
    return float(row[what][0] / row[what][1])


def table(found: list[dict[str, Any]]) -> Table:
    """Predictions beside measurements."""
    result = Table("n", "k", "d", "rows", "s/step", "measured", "ratio", box=None)
    for name in ("MB", "measured", "ratio"):
        result.add_column(name)
    for row in found:
        cells = [f"{value:,}" for value in row["shape"]]
        for what, scale, form in (("seconds", 1.0, ".3f"), ("memory", 1e6, ",.0f")):
            predicted, real = row[what]
            cells += [f"{predicted / scale:{form}}", f"{real / scale:{form}}"]
            cells.append(f"{predicted / real:.2f}")
        result.add_row(*cells)
    return result


def one(n_latents: int, k: int, d_in: int, batch_rows: int) -> dict[str, Any]:
    """Trains one shape for a few steps; what was predicted and what was measured."""
    learner, x = _begin(SMALL_LATENTS, k, d_in, SMALL_ROWS)
    learner.advance(x)  # compiled code is loaded
    idle = peak_bytes()
    learner, x = _begin(n_latents, k, d_in, batch_rows)
    learner.advance(x)
    peak = peak_bytes() - idle
    device = torch.device("cpu")
    before = measure_rates(device)
    steps = [seconds(lambda: learner.advance(x)) for _ in range(STEPS)]
    rates = _mean(before, measure_rates(device))
    shape = shape_of(learner.config, d_in)
    return {
        "shape": [n_latents, k, d_in, batch_rows],
        "seconds": [sum(step_seconds(shape, rates).values()), median(steps)],
        "memory": [sum(memory(shape, rates.low_bytes).values()), peak],
    }


def _begin(n_latents: int, k: int, d_in: int, batch_rows: int) -> tuple[Learner, torch.Tensor]:
    """A learner and a batch of noise."""
    config = TrainConfig(n_latents=n_latents, k=k, tokens=100 * batch_rows, batch_rows=batch_rows)
    x = torch.randn(batch_rows, d_in, generator=torch.Generator().manual_seed(0))
    about = {"name": "", "weights": ""}
    return Learner.begin(config, "resid_post.0", x, None, torch.device("cpu"), about), x


def _mean(first: Rates, second: Rates) -> Rates:
    """Harmonic means of rates, that is, means of times."""

    def both(a: float, b: float) -> float:
        return 2 / (1 / a + 1 / b)

    moved = {name: both(rate, second.moved[name]) for name, rate in first.moved.items()}
    return replace(
        first,
        product=both(first.product, second.product),
        selection=both(first.selection, second.selection),
        moved=moved,
    )


def main(arguments: list[str]) -> None:
    if arguments:
        print(json.dumps(one(*map(int, arguments))))
        return
    found = compare()
    output().print(table(found))
    for what in ("seconds", "memory"):
        off = np.abs(np.log([_ratio(row, what) for row in found]))
        output().print(
            f"{what}: off by {np.exp(off.mean()) - 1:.0%} on average, "
            f"{np.exp(off.max()) - 1:.0%} at most"
        )


if __name__ == "__main__":
    main(sys.argv[1:])
