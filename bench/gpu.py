"""The training step on a GPU against its limit, one bf16 encoder product, and what it is made of.

    python -m bench.gpu

Prints, and writes to bench/results/DEVICE.json, for the GPU's shape (batch 65,536, d 768, 131,072
latents, k 32) and the processor's (batch 4,096, 24,576 latents): milliseconds of a whole step
(AuxK armed, no latent dead), of the product, their ratio, tokens per second, the step's parts, and
the recall of the choice; with e4m3 and with bfloat16 choosing. Then the product that is fused with
its group maxima, for each tile. Times are CUDA events, medians over rounds taken in turn.
"""

from __future__ import annotations

import json
import re
import sys
from collections import defaultdict
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.table import Table
from torch import Tensor

from sae_harvest.common.console import output
from sae_harvest.train.config import TrainConfig
from sae_harvest.train.sae.sae import SAE
from sae_harvest.train.step.learner import Learner

RESULTS = Path(__file__).parent / "results"
ROUNDS, WARM_UP = 12, 3
PRODUCT_ROWS = 8192  # of a product at a time: its scores are 2 GB at 131,072 latents
RECALL_ROWS = 4096
GOAL = 2.0  # step over product


@dataclass(frozen=True)
class Shape:
    batch_rows: int
    d_in: int
    n_latents: int
    k: int

    @property
    def flops(self) -> float:
        """Of the encoder product."""
        return 2.0 * self.batch_rows * self.d_in * self.n_latents


SHAPES = {
    "gpu": Shape(batch_rows=65_536, d_in=768, n_latents=131_072, k=32),
    "processor": Shape(batch_rows=4096, d_in=768, n_latents=24_576, k=32),
}


class _Timed:
    """The kernels, with CUDA events around each call."""

    def __init__(self, kernels: Any) -> None:
        self._kernels = kernels
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []

    def __getattr__(self, name: str) -> Callable[..., Any]:
        method = getattr(self._kernels, name)

        def timed(*args: Any, **kwargs: Any) -> Any:
            before, after = _event(), _event()
            before.record()
            result = method(*args, **kwargs)
            after.record()
            self._events.append((name, before, after))
            return result

        return timed

    def collect(self) -> dict[str, float]:
        """Milliseconds by method since the last time; the device has to be done."""
        total: defaultdict[str, float] = defaultdict(float)
        for name, before, after in self._events:
            total[name] += before.elapsed_time(after)
        self._events.clear()
        return total


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)


def _milliseconds(work: Callable[[], object]) -> float:
    before, after = _event(), _event()
    torch.cuda.synchronize()
    before.record()
    work()
    after.record()
    torch.cuda.synchronize()
    return before.elapsed_time(after)


def time_step(shape: Shape, fp8: bool) -> dict[str, Any]:
    """Milliseconds of a step, its parts, and the product; recall of the choice."""
    from sae_harvest.train.sae.kernels.triton_ops import TritonKernels

    device = torch.device("cuda")
    generator = torch.Generator(device).manual_seed(0)
    x = torch.randn(shape.batch_rows, shape.d_in, generator=generator, device=device)
    config = TrainConfig(
        n_latents=shape.n_latents, k=shape.k, tokens=10**9, batch_rows=shape.batch_rows
    )
    model = {"name": "", "weights": ""}
    sample = x[:RECALL_ROWS].cpu()
    begun = Learner.begin(config, "resid_post.0", sample, None, device, model)
    sae = SAE(begun.sae.config, **begun.sae.tensors())
    timed = _Timed(TritonKernels(device, fp8))
    sae.kernels = timed
    learner = Learner(config, sae, begun.numbers()["total_variance"])
    low_x, low_w = x.bfloat16(), sae.W_enc.bfloat16()
    chunk = min(PRODUCT_ROWS, shape.batch_rows)
    scores = torch.empty(chunk, shape.n_latents, dtype=torch.bfloat16, device=device)

    def product() -> None:
        for rows in low_x.split(chunk):
            torch.mm(rows, low_w.T, out=scores)

    steps, products = [], []
    parts: defaultdict[str, list[float]] = defaultdict(list)
    for number in range(WARM_UP + ROUNDS):
        product_took = _milliseconds(product)
        step_took = _milliseconds(lambda: learner.advance(x))
        spent = timed.collect()
        if number >= WARM_UP:
            products.append(product_took)
            steps.append(step_took)
            for name, took in spent.items():
                parts[name].append(took)
    step, limit = median(steps), median(products)
    shares = {name: median(took) for name, took in parts.items()}
    return {
        "step_ms": step,
        "product_ms": limit,
        "ratio": step / limit,
        "tokens_per_second": 1e3 * shape.batch_rows / step,
        "product_tflops": shape.flops / limit / 1e9,
        "parts_ms": shares | {"other": step - sum(shares.values())},
        "recall": _recall(sae, x[:RECALL_ROWS], shape.k),
        "memory_gib": torch.cuda.max_memory_allocated() / 2**30,
    }


def _recall(sae: SAE, x: Tensor, k: int) -> float:
    """Share of the exact float32 top k that was among the candidates."""
    torch.backends.cuda.matmul.allow_tf32 = False
    centred = sae.centre(x)
    chosen = sae.kernels.choose(centred, sae.low, sae.b_enc, sae.low.candidates(k))
    found = 0
    for rows, candidates in zip(centred.split(256), chosen.split(256), strict=True):
        best = (rows @ sae.W_enc.T + sae.b_enc).topk(k, dim=1).indices  # [256, k]
        found += int((best.unsqueeze(2) == candidates.unsqueeze(1)).any(2).sum())
    return found / (len(x) * k)


def time_tiles(shape: Shape, fp8: bool) -> list[dict[str, Any]]:
    """TFLOP/s of the product fused with its group maxima, for each tile that fits the device."""
    from triton import OutOfResources

    from sae_harvest.train.sae.kernels.triton_low import GroupedLow, shorten
    from sae_harvest.train.sae.kernels.triton_scores import TILES, group_maxima

    device = torch.device("cuda")
    rows = min(32_768, shape.batch_rows)
    short, scale = shorten(torch.randn(rows, shape.d_in, device=device), fp8)
    low = GroupedLow(shape.n_latents, shape.d_in, fp8, device)
    low.refresh(torch.randn(shape.n_latents, shape.d_in, device=device))
    offsets = low.by_position(torch.zeros(shape.n_latents, device=device), -torch.inf)
    inverse = scale.reciprocal()
    found = []
    for tile in TILES:
        fused = partial(group_maxima, short, inverse, low, offsets, tile)
        try:
            fused()
        except OutOfResources:
            continue  # more shared memory than this GPU has
        took = median(_milliseconds(fused) for _ in range(ROUNDS))
        flops = shape.flops * rows / shape.batch_rows
        found.append(asdict(tile) | {"ms": took, "tflops": flops / took / 1e9})
    return found


def main() -> None:
    if not torch.cuda.is_available():
        sys.exit(
            "Error: bench.gpu measures a CUDA GPU and there is none here; run it where one is."
        )
    import triton

    name = torch.cuda.get_device_name()
    content: dict[str, Any] = {
        "device": name,
        "measured": datetime.now(UTC).isoformat(timespec="seconds"),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "shapes": {label: asdict(shape) for label, shape in SHAPES.items()},
        "steps": {},
        "tiles": {},
    }
    has_fp8 = torch.cuda.get_device_capability() >= (8, 9)
    path = RESULTS / (re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") + ".json")
    for label, shape in SHAPES.items():
        for fp8 in (True, False) if has_fp8 else (False,):
            key = f"{label}, choosing in {'e4m3' if fp8 else 'bfloat16'}"
            torch.cuda.reset_peak_memory_stats()
            content["steps"][key] = time_step(shape, fp8)
            content["tiles"][key] = time_tiles(shape, fp8)
            path.write_text(json.dumps(content, indent=2) + "\n")  # each as it comes
            _show(key, content["steps"][key], content["tiles"][key])
    output().print(f"goal: a step of at most {GOAL} products; written to {path}")


def _show(key: str, step: dict[str, Any], tiles: list[dict[str, Any]]) -> None:
    table = Table(key, "ms", "of the product", box=None)
    parts = step["parts_ms"] | {"step": step["step_ms"], "bf16 product": step["product_ms"]}
    for name, took in parts.items():
        table.add_row(name, f"{took:.2f}", f"{took / step['product_ms']:.2f}")
    output().print(table)
    output().print(
        f"{step['tokens_per_second']:,.0f} tokens/s, recall {step['recall']:.5f}, "
        f"product {step['product_tflops']:.0f} TFLOP/s, {step['memory_gib']:.1f} GiB"
    )
    for tile in tiles:
        output().print(
            f"  tile {tile['rows']} x {tile['columns']}, {tile['warps']} warps, "
            f"{tile['stages']} stages: {tile['tflops']:.0f} TFLOP/s"
        )


if __name__ == "__main__":
    main()
