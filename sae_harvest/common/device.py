"""The device to compute on, and its threads."""

from __future__ import annotations

from sae_harvest.common.cache import use_numba_cache
from sae_harvest.common.errors import InputError


def choose_device(name: str) -> str:
    """cpu or cuda; `auto` is cuda where there is one. `InputError` for a cuda that is not there."""
    import torch  # a second to import, and commands that only read a store do without

    available = torch.cuda.is_available()
    if name == "cuda" and not available:
        raise InputError("--device cuda: this machine has no usable GPU; use --device cpu.")
    return "cuda" if available and name != "cpu" else "cpu"


def use_threads(threads: int) -> None:
    """Have torch and numba use so many threads, from here on and in this thread."""
    import torch

    use_numba_cache()  # before numba is imported
    import numba

    torch.set_num_threads(threads)
    numba.set_num_threads(min(threads, numba.config.NUMBA_NUM_THREADS))
