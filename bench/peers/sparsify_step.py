"""CPU seconds of training steps of eai-sparsify, run by its own interpreter.

    peer/bin/python bench/peers/sparsify_step.py DEVICE_STEPS

Same shape as `bench.sae_step`: batch 4096, d 768, n 24,576, k 32, random rows, its own default
optimiser settings for Adam. Prints one JSON object: cpu and wall seconds a step, medians.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from statistics import median

import torch
from sparsify import SparseCoder, SparseCoderConfig

D_IN, N_LATENTS, K, BATCH_ROWS = 768, 24_576, 32, 4096
WARM_UP = 2


def cpu_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def main() -> None:
    steps = int(sys.argv[1])
    torch.manual_seed(0)
    coder = SparseCoder(D_IN, SparseCoderConfig(num_latents=N_LATENTS, k=K))
    optimizer = torch.optim.Adam(coder.parameters(), lr=1e-4, fused=True)
    x = torch.randn(BATCH_ROWS, D_IN)
    cpu, wall = [], []
    for step in range(WARM_UP + steps):
        started, clock = cpu_seconds(), time.perf_counter()
        coder.set_decoder_norm_to_unit_norm()
        coder(x).fvu.backward()
        coder.remove_gradient_parallel_to_decoder_directions()
        optimizer.step()
        optimizer.zero_grad()
        if step >= WARM_UP:
            cpu.append(cpu_seconds() - started)
            wall.append(time.perf_counter() - clock)
    print(json.dumps({"cpu": median(cpu), "wall": median(wall)}))


if __name__ == "__main__":
    main()
