"""Work shared out: in this process, or among Ray workers; answers come in the order of the work.

`map` is for work that keeps all threads of a worker busy by itself. `spread` is for work that goes
through stages some of which take one thread: a worker does several pieces at once, each with its
share of the threads. Such work must not use numba's own threads, which on some machines are for one
caller at a time.
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
AT_ONCE = 4  # pieces of work that a worker does, at most: each takes memory
AHEAD = 2  # pieces of work handed out per worker: one at work, one waiting


class Pool(Protocol):
    """`workers`: how many pieces of work are done side by side."""

    workers: int

    def map(self, work: Callable[..., T], arguments: Iterable[tuple[Any, ...]]) -> Iterator[T]:
        """`work(*a)` for each of the arguments, in their order."""

    def spread(self, work: Callable[..., T], arguments: Iterable[tuple[Any, ...]]) -> Iterator[T]:
        """`work(stopped, *a)`; the event is set when nobody waits for the answer any more."""


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
                torch.set_num_threads(threads)  # they may have started threads themselves


class RayWorkers:
    """Ray tasks. Work may be done again when a worker dies, so it has to be repeatable."""

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
    """So many Ray workers, each with a GPU or its share of the cores; this process for 0.

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
    """In a worker."""
    use_threads(threads)
    return work(*arguments)


def _several(work: Callable[..., T], arguments: list[tuple[Any, ...]]) -> list[T]:
    """In a worker."""
    return list(InProcess().spread(work, arguments))
