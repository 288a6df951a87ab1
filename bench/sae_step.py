"""Time of one SAE training step against its physical limit, one bf16 encoder product.

    python -m bench.sae_step

The step is the whole of it: choosing, exact values, decoding, gradients, clipping, Adam, unit
decoder rows, average of weights, AuxK armed (no latent is dead at the start). The product writes
into memory that is already there, the most that can be asked of it. Both are timed in turn,
round by round, so that a busy machine slows both.
"""

from __future__ import annotations

import json
import subprocess
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.table import Table

from bench.measurement import Measurement
from sae_harvest.common.console import output
from sae_harvest.train.config import TrainConfig
from sae_harvest.train.step.initialization import Start, initial_sae
from sae_harvest.train.step.loss_and_gradients import Workspace, train_step
from sae_harvest.train.step.optimizer import Optimizer

D_IN, N_LATENTS, K, BATCH_ROWS = 768, 24_576, 32, 4096
ROUNDS = 12
SOME_DEAD = 2000  # a second table says what AuxK costs then
GOAL, FLOOR = 1.4, 2.0
PEER = Path(__file__).parents[1] / ".venv-peers" / "sparsify" / "bin" / "python"
PEER_STEPS = 6


class _Timed:
    """The kernels, with the seconds each took."""

    def __init__(self, kernels: Any) -> None:
        self._kernels = kernels
        self.seconds: defaultdict[str, list[float]] = defaultdict(list)

    def __getattr__(self, name: str) -> Callable[..., Any]:
        method = getattr(self._kernels, name)

        def timed(*args: Any, **kwargs: Any) -> Any:
            started = time.perf_counter()
            result = method(*args, **kwargs)
            self.seconds[name].append(time.perf_counter() - started)
            return result

        return timed


def time_step(device: str = "cpu", rounds: int = ROUNDS, n_dead: int = 0) -> dict[str, Any]:
    """Seconds a step and seconds of the product, medians over rounds, and their ratio.

    Returns:
        value and limit (seconds), ratio, cpu (CPU seconds a step), parts (seconds by name).
    """
    config = TrainConfig(n_latents=N_LATENTS, k=K, tokens=BATCH_ROWS, batch_rows=BATCH_ROWS)
    where = torch.device(device)
    model = {"name": "", "weights": ""}
    start = Start(1.0, D_IN, torch.zeros(D_IN))
    sae = initial_sae(config, "resid_post.0", start, where, model)
    optimizer, workspace = Optimizer(sae, config), Workspace(sae, BATCH_ROWS)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(BATCH_ROWS, D_IN, generator=generator).to(where)
    dead = torch.zeros(N_LATENTS, dtype=torch.bool, device=where)
    dead[torch.randperm(N_LATENTS, generator=generator)[:n_dead]] = True
    low_x, low_w = x.bfloat16(), sae.W_enc.bfloat16()
    scores = torch.empty(BATCH_ROWS, N_LATENTS, dtype=torch.bfloat16, device=where)
    timed = _Timed(sae.kernels)
    sae.kernels = timed

    def product() -> None:
        torch.mm(low_x, low_w.T, out=scores)

    def step() -> None:
        result = train_step(sae, x, config, D_IN, dead, workspace)
        optimizer.step(sae, workspace, result.grad_norm)

    product_seconds, step_seconds, step_cpu = [], [], []
    for round_number in range(rounds + 2):
        if round_number == 2:  # compiled and warm
            timed.seconds.clear()
        took = _seconds(product, where)
        before = time.process_time()
        step_took = _seconds(step, where)
        if round_number >= 2:
            product_seconds.append(took)
            step_seconds.append(step_took)
            step_cpu.append(time.process_time() - before)
    limit, value = float(np.median(product_seconds)), float(np.median(step_seconds))
    parts = {name: float(np.median(_per_step(s, rounds))) for name, s in timed.seconds.items()}
    return {
        "value": value,
        "limit": limit,
        "ratio": value / limit,
        "cpu": float(np.median(step_cpu)),
        "parts": {**parts, "other": value - sum(parts.values())},
    }


def measure(folder: Path) -> list[Measurement]:
    """sae_step, and sae_step_vs_sparsify where the peer is installed; nothing of `folder`."""
    timed = time_step()
    step = Measurement(
        "sae_step", timed["value"], timed["limit"], "s", GOAL, FLOOR, higher_is_better=False
    )
    if not PEER.exists():
        output().print("sae_step_vs_sparsify is left out: `make bench` installs the peer.")
        return [step]
    command: list[str | Path] = [
        PEER,
        Path(__file__).parent / "peers" / "sparsify_step.py",
        str(PEER_STEPS),
    ]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    peer = json.loads(printed.splitlines()[-1])
    versus = Measurement(
        "sae_step_vs_sparsify",
        timed["cpu"],
        peer["cpu"],
        "CPU s",
        1 / 4,
        1 / 3,
        higher_is_better=False,
    )
    return [step, versus]


def _seconds(work: Callable[[], None], where: torch.device) -> float:
    started = time.perf_counter()
    work()
    if where.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def _per_step(seconds: list[float], rounds: int) -> list[float]:
    """Sums of the calls of each step."""
    return np.array(seconds).reshape(rounds, -1).sum(1).tolist()


def main() -> None:
    for n_dead in (0, SOME_DEAD):
        result = time_step(n_dead=n_dead)
        table = Table(f"{n_dead:,} dead latents", "ms", "of the product", box=None)
        for name, seconds in result["parts"].items():
            table.add_row(name, f"{1e3 * seconds:.1f}", f"{seconds / result['limit']:.2f}")
        table.add_row("step", f"{1e3 * result['value']:.1f}", f"{result['ratio']:.2f}")
        table.add_row("bf16 product", f"{1e3 * result['limit']:.1f}", "1.00")
        output().print(table)
    output().print(f"goal {GOAL}, floor {FLOOR}")


if __name__ == "__main__":
    main()
