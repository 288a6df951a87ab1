"""Compiles every Triton kernel for Hopper GPUs, without one, and says what came out.

    python -m tests.triton_for_hopper

The kernels are called as training calls them, on tensors of the processor, and compiled instead
of launched. One line of JSON a kernel: its name, bytes of the stack that a thread needs (spilled
registers), bytes of shared memory, and how many instructions multiply matrices.
"""

from __future__ import annotations

import json
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from sae_harvest.train.sae.kernels import AdamNumbers, Gradients, Pairs
from sae_harvest.train.sae.kernels.triton_ops import TritonKernels

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
ROWS, D_IN, N_LATENTS, K = 128, 768, 16_384, 32


class _Hopper:
    """What Triton asks its driver while it compiles."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


_run = JITFunction.run


def _compile(kernel: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
    compiled = _run(kernel, *args, grid=grid, warmup=True, **options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage, code = (
            subprocess.run([CUOBJDUMP, what, file.name], check=True, capture_output=True, text=True)
            for what in ("--dump-resource-usage", "--dump-sass")
        )
    found = re.search(r"STACK:(\d+)", usage.stdout)
    assert found, usage.stdout
    line = {
        "kernel": kernel.__name__,
        "stack": int(found[1]),
        "shared": compiled.metadata.shared,
        "products": len(re.findall(r"\b[HQ]GMMA\b", code.stdout)),
    }
    print(json.dumps(line), flush=True)
    return compiled


def main() -> None:
    driver.set_active(_Hopper())
    JITFunction.run = _compile
    torch.empty = torch.zeros  # what a kernel would have written is read
    weight = torch.nn.functional.normalize(torch.randn(N_LATENTS, D_IN))
    x, bias = torch.randn(ROWS, D_IN), torch.zeros(N_LATENTS)
    for fp8 in (False, True):
        kernels = TritonKernels(torch.device("cpu"), fp8)
        low = kernels.low_precision(weight)
        kernels.choose(x, low, bias, low.candidates(K))
        kernels.choose_above(x, low, bias, bias)
    indices = torch.randint(0, N_LATENTS, (ROWS, K), dtype=torch.int32)
    values, into = torch.rand(ROWS, K), Gradients.like(weight, weight)
    kernels.exact(x, weight, bias, indices, K, relu=True)
    kernels.decode(indices, values, weight, x.clone())
    kernels.gradients(Pairs(indices, values), x, x, weight, into, add=False)
    pairs = Pairs(indices, values, values, values)
    kernels.gradients(pairs, x, x, weight, into, add=True, slopes=values.clone())
    kernels.latent_sums(indices, values, N_LATENTS)
    numbers = AdamNumbers(1.0, 0.1, 0.9, 0.999, 1.0, 1e-9, 0.5)
    for unit_rows in (False, True):
        kernels.adam(weight, weight, weight, weight, weight, numbers, unit_rows)


if __name__ == "__main__":
    main()
