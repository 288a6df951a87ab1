"""Pools of workers for shards: Ray actors (`harvest.run.ray_pool`), or threads of this process."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import Any, Protocol

from sae_harvest.harvest.model.models import ResolvedModel
from sae_harvest.harvest.run.log import Notify
from sae_harvest.harvest.run.worker import IN_FLIGHT, Done, ShardWorker
from sae_harvest.store.layout import Plan
from sae_harvest.store.objects import Objects
from sae_harvest.store.writer import Shard

POLL_SECONDS = 0.5


class Pool(Protocol):
    """Takes shards and returns commit records, in any order. One thread uses it.

    `widths` and `collect` raise the `SaeHarvestError` of a worker.
    """

    capacity: int  # shards in flight that keep every worker busy

    def widths(self) -> dict[str, int]:
        """Return the numbers per row of each site, when a worker has loaded the model."""
        ...

    def submit(self, objects: Objects, plan: Plan, shard: Shard) -> None: ...

    def collect(self) -> list[dict[str, Any]]:
        """Return the commit records of shards whose objects are all published.

        Waits up to half a second for the first record; empty if there is none.
        """
        ...

    def in_flight(self) -> list[int]:
        """Return the numbers of the shards submitted and not yet collected, ascending."""
        ...

    def rows_done(self) -> int:
        """Count the rows that went through the model; rows lost with a worker are subtracted."""
        ...

    def close(self) -> None: ...


class LocalPool:
    """One worker in this process: no Ray, for notebooks, debugging and tests."""

    capacity = IN_FLIGHT

    def __init__(
        self,
        report: Notify,
        model: ResolvedModel,
        sites: tuple[str, ...],
        compute_dtype: str,
        device: str,
    ) -> None:
        self._report = report
        self._worker = ShardWorker(model, sites, compute_dtype, device, threads=None)
        self._threads = ThreadPoolExecutor(IN_FLIGHT)
        self._pending: dict[Future[Done], int] = {}  # → shard

    def widths(self) -> dict[str, int]:
        return self._worker.widths()

    def submit(self, objects: Objects, plan: Plan, shard: Shard) -> None:
        future = self._threads.submit(self._worker.harvest, objects, plan, shard)
        self._pending[future] = shard.number

    def collect(self) -> list[dict[str, Any]]:
        ready, _ = wait(self._pending, timeout=POLL_SECONDS, return_when=FIRST_COMPLETED)
        records = []
        for future in ready:
            del self._pending[future]
            done = future.result()
            self._report(done_sentence(done, "this process"))
            records.append(done.record)
        return records

    def in_flight(self) -> list[int]:
        return sorted(self._pending.values())

    def rows_done(self) -> int:
        return self._worker.rows_done()

    def close(self) -> None:
        self._worker.stop()
        self._threads.shutdown(cancel_futures=True)


def done_sentence(done: Done, worker: str) -> str:
    """Format the log's line about a shard that a worker has done."""
    return (
        f"shard {done.record['shard']}: {done.record['rows']:,} rows by {worker}, "
        f"{done.seconds_model:.1f} s in the model, {done.seconds_write:.1f} s writing"
    )


@contextlib.contextmanager
def open_pool(
    workers: int,
    model: ResolvedModel,
    sites: tuple[str, ...],
    compute_dtype: str,
    device: str,
    address: str | None,
    report: Notify,
) -> Iterator[Pool]:
    """Start workers that load the model; when the block ends, all of them have stopped writing.

    Args:
        workers: Ray actors; 0 means this process, without Ray.
        address: `host:port` of a running Ray cluster, or `auto` for the one on this machine;
            None starts a Ray of our own.
        report: called with sentences about workers: started, died, finished a shard.

    Raises:
        RunError: Ray can't be started or reached, or has no room for so many workers.
    """
    with contextlib.ExitStack() as stack:
        pool: Pool
        if workers:
            from sae_harvest.common import ray_cluster as cluster
            from sae_harvest.harvest.run.ray_pool import RayPool

            stack.enter_context(cluster.connected(address, workers))
            pool = RayPool(workers, address, report, model, sites, compute_dtype, device)
        else:
            pool = LocalPool(report, model, sites, compute_dtype, device)
        stack.callback(pool.close)
        yield pool
