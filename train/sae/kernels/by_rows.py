"""Rows of a batch divided among threads of our own, each of which runs serial code.

The threads of torch and of numba spin after each loop and wait for one another. On some machines,
only one caller at a time may use numba's threads.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from threading import Barrier, Lock, get_ident
from typing import TypeVar

import torch

MIN_ROWS, MAX_ROWS = 64, 512  # rows of a slice; with few, products are slow

Result = TypeVar("Result")

_starting = Lock()


def by_rows(batch: int, work: Callable[[slice], Result]) -> list[Result]:
    """Call `work` on consecutive slices of the rows, in as many threads as torch uses."""
    threads = torch.get_num_threads()
    step = min(MAX_ROWS, max(MIN_ROWS, -(-batch // threads)))
    parts = [slice(first, min(first + step, batch)) for first in range(0, batch, step)]
    if threads == 1 or len(parts) == 1:
        return list(map(work, parts))
    # one set of threads for each process (a fork loses threads) and each caller
    return list(_kept_threads(threads, os.getpid(), get_ident()).map(work, parts))


def torch_threads(count: int, each: int, name: str) -> ThreadPoolExecutor:
    """Start `count` threads; in each, torch uses `each` threads, whatever the caller's setting."""
    usual, started = torch.get_num_threads(), Barrier(count + 1)

    def begin() -> None:
        torch.set_num_threads(each)  # also the setting with which later threads begin
        torch.get_num_threads()  # else this thread would read the setting later
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
