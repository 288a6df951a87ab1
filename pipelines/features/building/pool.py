"""Pools of workers: this process, or Ray workers. Results come in the order of the work.

`map` is for work that uses all threads of a worker. `spread` is for work with stages that use only
one thread: a worker does several pieces at once, each with its share of the threads. Such work must
not use numba's own threads, which on some machines allow one caller at a time.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from threading import Event
from typing import Any, Protocol, TypeVar

import torch

from sae_harvest.common.device import use_threads
from sae_harvest.common.errors import RunError
from sae_harvest.train.sae.kernels.by_rows import torch_threads

T = TypeVar("T")
AT_ONCE = 4  # most pieces of work that a worker does at once: each needs memory
AHEAD = 2  # pieces of work submitted per worker: one in progress, one waiting


class Pool(Protocol):
    """Does pieces of work, several at a time."""

    workers: int
    """Number of pieces of work done at the same time."""

    def map(self, work: Callable[..., T], arguments: Iterable[tuple[Any, ...]]) -> Iterator[T]:
        """Yield `work(*a)` for each of the arguments, in their order."""

    def spread(self, work: Callable[..., T], arguments: Iterable[tuple[Any, ...]]) -> Iterator[T]:
        """Yield `work(stopped, *a)`; the event is set when the result is no longer needed."""


class InProcess:
    """This process, with all its threads."""

    workers = 1

    def map(self, work: Callable[..., T], arguments: Iterable[tuple[Any, ...]]) -> Iterator[T]:
        return (work(*a) for a in arguments)

    def spread(self, work: Callable[..., T], arguments: Iterable[tuple[Any, ...]]) -> Iterator[T]:
        stopped, threads = Event(), torch.get_num_threads()
        count = min(AT_ONCE, threads)
        with torch_threads(count, threads // count, "spread") as pool:
            try:
                yield from pool.map(lambda a: work(stopped, *a), arguments)
            finally:
                stopped.set()
                torch.set_num_threads(threads)  # threads may have changed it


class RayWorkers:
    """Ray tasks. Work is repeated when a worker dies, so it must allow repetition."""

    def __init__(self, workers: int, threads: int, gpu: bool) -> None:
        import ray

        self.workers = workers
        self._call = ray.remote(num_cpus=threads, num_gpus=int(gpu), max_retries=3)(_call)
        self._threads = threads

    def spread(self, work: Callable[..., T], arguments: Iterable[tuple[Any, ...]]) -> Iterator[T]:
        given = list(arguments)
        each = max(1, min(AT_ONCE, len(given) // (8 * self.workers)))
        pieces = ((work, given[first : first + each]) for first in range(0, len(given), each))
        for answers in self.map(_several, pieces):
            yield from answers

    def map(self, work: Callable[..., T], arguments: Iterable[tuple[Any, ...]]) -> Iterator[T]:
        from ray.exceptions import RayError, RayTaskError

        from sae_harvest.common import ray_cluster as cluster

        left = iter(arguments)
        running: deque[Any] = deque()
        while True:
            for a in islice(left, AHEAD * self.workers - len(running)):
                running.append(self._call.remote(self._threads, work, a))
            if not running:
                return
            try:
                yield cluster.answer(running.popleft())
            except RayTaskError:
                raise
            except RayError as error:
                raise RunError(
                    f"A worker is gone ({cluster.reason(error)}); the same command continues."
                ) from error


@contextmanager
def open_pool(workers: int, address: str | None, gpu: bool) -> Iterator[Pool]:
    """Open a pool of Ray workers, each with a GPU or its share of the cores; 0: this process.

    Raises:
        RunError: Ray cannot be started or joined, or has no room for them.
    """
    if workers == 0:
        yield InProcess()
        return
    from sae_harvest.common import ray_cluster as cluster

    with cluster.connected(address, workers):
        yield RayWorkers(workers, cluster.threads_per_worker(workers, gpu), gpu)


def _call(threads: int, work: Callable[..., T], arguments: tuple[Any, ...]) -> T:
    """Do one piece of work in a worker."""
    use_threads(threads)
    return work(*arguments)


def _several(work: Callable[..., T], arguments: list[tuple[Any, ...]]) -> list[T]:
    """Do several pieces of work in a worker."""
    return list(InProcess().spread(work, arguments))
