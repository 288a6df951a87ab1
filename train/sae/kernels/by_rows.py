"""Rows of a batch shared out among threads of our own, each of which runs serial code.

Torch's and numba's own threads spin after each loop and wait for one another; and several callers
may not be in numba's at once on every machine.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from threading import Barrier, Lock, get_ident
from typing import TypeVar

import torch

MIN_ROWS, MAX_ROWS = 64, 512  # of a slice; with few, a product prepares all weights again

Result = TypeVar("Result")

_starting = Lock()


def by_rows(batch: int, work: Callable[[slice], Result]) -> list[Result]:
    """Call `work` on consecutive slices of the rows, in as many threads as torch uses."""
    threads = torch.get_num_threads()
    step = min(MAX_ROWS, max(MIN_ROWS, -(-batch // threads)))
    parts = [slice(first, min(first + step, batch)) for first in range(0, batch, step)]
    if threads == 1 or len(parts) == 1:
        return list(map(work, parts))
    # of this process, since a fork doesn't keep them, and of this caller
    return list(_kept_threads(threads, os.getpid(), get_ident()).map(work, parts))


def torch_threads(count: int, each: int, name: str) -> ThreadPoolExecutor:
    """So many threads, in each of which torch uses so many, whatever it does in the caller's."""
    usual, started = torch.get_num_threads(), Barrier(count + 1)

    def begin() -> None:
        torch.set_num_threads(each)  # also what all threads to come begin with
        torch.get_num_threads()  # or this thread would take up what is set when it first asks
        started.wait()

    pool = ThreadPoolExecutor(count, name)
    with _starting:
        for _ in range(count):
            pool.submit(begin)
        started.wait()
        torch.set_num_threads(usual)
    return pool


@cache
def _kept_threads(count: int, process: int, caller: int) -> ThreadPoolExecutor:
    return torch_threads(count, 1, "rows")
