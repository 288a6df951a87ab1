"""Measure the speed of the parts of a training step on this machine, in about a second.

The trainer's own kernels are timed on a small step: the rates are those of the code that will run.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from math import inf

import torch

from sae_harvest.train.config import TrainConfig
from sae_harvest.train.planning.count import BATCH_PASSES, available_bytes, shape_of, step_work
from sae_harvest.train.planning.estimate import Rates
from sae_harvest.train.sae.kernels import AdamNumbers, Gradients, Kernels, Pairs, kernels_for

ROWS, N_LATENTS, K, WIDTH = 2048, 8192, 32, 512
NARROW, WIDE = 256, 1024  # two widths, to separate the product from the selection
ROUNDS = 3
EMPTY_STEP = 1e-3  # seconds of a step without arithmetic: checks, metrics, launches
NUMBERS = AdamNumbers(scale=1, rate=1e-4, beta1=0.9, beta2=0.999, root=1, eps=1e-9, keep=0.999)
LINK = 1.25e9  # bytes per second of a 10 gigabit network; not measured


def measure_rates(device: torch.device) -> Rates:
    """Measure the rates of a device with its kernels. The best of a few rounds counts."""
    kernels = kernels_for(device)
    narrow, wide = (_choose_seconds(kernels, device, width) for width in (NARROW, WIDE))
    # seconds = 2 * scores * width / product + scores / selection, at two widths
    scores = ROWS * N_LATENTS
    per_width = max((wide - narrow) / (WIDE - NARROW), 0.5 * wide / WIDE)
    rest = narrow - per_width * NARROW
    moved, low_bytes = _moving(kernels, device)
    return Rates(
        name=torch.cuda.get_device_name(device) if device.type == "cuda" else "this machine",
        product=2 * scores / per_width,
        selection=scores / rest if rest > 0 else inf,
        moved=moved,
        link=LINK,
        step=EMPTY_STEP,
        low_bytes=low_bytes,
        memory=available_bytes(device),
        estimate=False,
    )


def _choose_seconds(kernels: Kernels, device: torch.device, width: int) -> float:
    """Return the seconds that choosing latents takes at a width."""
    centred, weight = _random(ROWS, width, device), _random(N_LATENTS, width, device)
    low, bias = kernels.low_precision(weight), torch.zeros(N_LATENTS, device=device)
    count = low.candidates(K)
    return _seconds(device, lambda: kernels.choose(centred, low, bias, count))


def _moving(kernels: Kernels, device: torch.device) -> tuple[dict[str, float], float]:
    """Return the bytes per second of memory-bound parts, and the bytes of a low-precision weight.

    Bytes are counted as in `train.planning.count`.
    """
    config = TrainConfig(n_latents=N_LATENTS, k=K, tokens=ROWS, batch_rows=ROWS, auxk_alpha=0)
    shape = shape_of(config, WIDTH)
    centred, error = _random(ROWS, WIDTH, device), _random(ROWS, WIDTH, device)
    weight, bias = _random(N_LATENTS, WIDTH, device), torch.zeros(N_LATENTS, device=device)
    weight = torch.nn.functional.normalize(weight)
    low = kernels.low_precision(weight)
    held = [value for value in vars(low).values() if isinstance(value, torch.Tensor)]
    low_bytes = sum(value.nbytes for value in held) / weight.numel()
    chosen = kernels.choose(centred, low, bias, shape.chosen)
    indices, values = kernels.exact(centred, weight, bias, chosen, K, relu=True)
    pairs, into = Pairs(indices, values), Gradients.like(weight, weight)
    first, second, average = (torch.zeros_like(weight) for _ in range(3))

    def adam() -> None:
        for gradient, unit in ((into.enc, False), (into.dec, True)):
            kernels.adam(weight, gradient, first, second, average, NUMBERS, unit_rows=unit)
        kernels.refresh(low, weight)

    def batch() -> None:
        for _ in range(BATCH_PASSES):
            error.mul_(1.0)

    parts: dict[str, Callable[[], object]] = {
        "exact values": lambda: kernels.exact(centred, weight, bias, chosen, K, relu=True),
        "decode": lambda: kernels.decode(indices, values, weight, error),
        "gradients": lambda: kernels.gradients(pairs, error, centred, weight, into, add=False),
        "Adam": adam,
        "batch": batch,
    }
    work = step_work(shape, low_bytes=low_bytes)
    found = {name: work[name].bytes / _seconds(device, part) for name, part in parts.items()}
    return found, low_bytes


def _random(rows: int, width: int, device: torch.device) -> torch.Tensor:
    generator = torch.Generator().manual_seed(rows + width)
    return torch.randn(rows, width, generator=generator).to(device)


def _seconds(device: torch.device, work: Callable[[], object]) -> float:
    work()  # compiled, warm
    found = []
    for _ in range(ROUNDS):
        _wait(device)
        start = time.perf_counter()
        work()
        _wait(device)
        found.append(time.perf_counter() - start)
    return min(found)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
