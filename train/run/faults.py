"""Faults of disk, memory and GPU, distinguished."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError

from sae_harvest.common.errors import RunError
from sae_harvest.common.parsing import first_line

# texts in a RuntimeError that has no specific class
NO_MEMORY = (
    "DefaultCPUAllocator",
    "Cannot allocate memory",
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
)
OF_GPU = ("CUDA error", "Cuda failure", "unhandled cuda error", "CUBLAS_STATUS", "Triton Error")


@contextmanager
def explained(out: Path) -> Iterator[None]:
    """Raise faults of disk and memory as RunError. Other errors are bugs and stay as they are."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise RunError(
            f"Cannot read or write in {out} ({error}); see to the disk and its permissions, then "
            "run the same command again to continue."
        ) from error
    except (MemoryError, RuntimeError) as error:
        if not lacks_memory(error):
            raise
        reason = first_line(error) if str(error) else "no memory left"
        raise RunError(
            f"There is too little memory ({reason}); use fewer --n-latents or --batch-rows, and "
            "another --out, or a larger machine."
        ) from error


def lacks_memory(error: BaseException) -> bool:
    """True if an allocation failed, on the processor or on a GPU."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(part in str(error) for part in NO_MEMORY)


def is_of_gpu(error: BaseException) -> bool:
    """True if the GPU, its driver or a kernel failed, for example by an illegal address."""
    return isinstance(error, RuntimeError) and any(part in str(error) for part in OF_GPU)
