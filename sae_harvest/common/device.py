"""The device to compute on, and its threads."""

from __future__ import annotations

from sae_harvest.common.cache import use_numba_cache
from sae_harvest.common.errors import InputError


def choose_device(name: str) -> str:
    """Return cpu or cuda; `auto` is cuda if there is a GPU. Raise `InputError` without one."""
    import torch  # takes a second to import; commands that only read a store do not need it

    available = torch.cuda.is_available()
    if name == "cuda" and not available:
        raise InputError("--device cuda: this machine has no usable GPU; use --device cpu.")
    return "cuda" if available and name != "cpu" else "cpu"


def use_threads(threads: int) -> None:
    """Set the number of threads that torch and numba use in this thread from now on."""
    import torch

    use_numba_cache()  # before numba is imported
    import numba

    torch.set_num_threads(threads)
    numba.set_num_threads(min(threads, numba.config.NUMBA_NUM_THREADS))
