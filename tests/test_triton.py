"""The GPU's kernels: interpreted here, compiled for Hopper, and run where there is a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from sae_harvest.train.sae.kernels import kernels_for
from sae_harvest.train.sae.kernels.cpu import CpuKernels

if find_spec("triton") is None:
    pytest.skip("triton is not installed (Linux has it)", allow_module_level=True)

ROOT = Path(__file__).parents[1]
NEEDS_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


def run(*arguments: str, **environment: str) -> str:
    """What a Python process of its own prints; fails the test with that if it fails."""
    done = subprocess.run(
        [sys.executable, "-m", *arguments],
        cwd=ROOT,
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-8000:]
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("where", ["interpreted", pytest.param("on the GPU", marks=NEEDS_GPU)])
def test_kernels_equal_the_formulas(where):
    interpret = "1" if where == "interpreted" else "0"
    printed = run(
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "tests/triton_cases.py",
        TRITON_INTERPRET=interpret,
    )
    assert " passed" in printed
    assert " skipped" not in printed


@pytest.mark.slow
def test_kernels_compile_for_hopper_and_keep_to_registers():
    # Triton keeps what it has compiled, by a hash of the kernel's source, compiler and options.
    printed = run("tests.triton_for_hopper", TRITON_INTERPRET="0")
    lines = [json.loads(line) for line in printed.splitlines() if line.startswith("{")]
    products = [line for line in lines if line["products"]]
    assert {line["kernel"] for line in products} == {"group_maxima_kernel", "reaching_kernel"}
    assert len(products) == 4  # each in bfloat16 and e4m3
    for line in products:
        assert line["shared"] <= 113 << 10, line  # two programs share a multiprocessor
    for line in lines:
        assert line["stack"] <= 16, line


def test_a_processor_keeps_its_own_kernels():
    assert isinstance(kernels_for(torch.device("cpu")), CpuKernels)


@NEEDS_GPU
def test_a_gpu_has_the_triton_kernels():
    assert type(kernels_for(torch.device("cuda"))).__name__ == "TritonKernels"
