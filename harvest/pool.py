"""Where shards are worked on: Ray actors, or threads of this process."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any, Protocol

from harvest.contexts import ShardInput
from harvest.models import ResolvedModel
from harvest.worker import ShardWorker
from store.errors import RunError, SaeHarvestError
from store.layout import Plan

IN_FLIGHT = 2  # per worker: one in the model, one being written
POLL_SECONDS = 0.5
STOP_SECONDS = 5.0
OBJECT_STORE_BYTES = 256 << 20  # shards travel as token ids, not as activations

# glibc gives every tensor of a megabyte or more back to the system when it is freed, and in a Ray
# worker takes it anew, page by page, for the next operator: a sixth of the time of a forward
# pass on a processor. With these a worker keeps what it has had once.
KEEP_MEMORY = {
    "MALLOC_MMAP_THRESHOLD_": str(1 << 30),
    "MALLOC_TRIM_THRESHOLD_": str(1 << 40),
    "MALLOC_ARENA_MAX": "1",
}


class Pool(Protocol):
    """Takes shards and gives commit records back, in any order."""

    capacity: int

    def widths(self) -> dict[str, int]: ...
    def submit(self, root: Path, plan: Plan, shard: ShardInput) -> None: ...
    def collect(self) -> list[dict[str, Any]]:
        """Records that became ready within about half a second."""
        ...

    def rows_done(self) -> int: ...
    def close(self) -> None: ...


class LocalPool:
    """One worker in this process: no Ray, for notebooks, debugging and tests."""

    capacity = IN_FLIGHT

    def __init__(self, **worker: Any) -> None:
        self._worker = ShardWorker(threads=None, **worker)
        self._threads = ThreadPoolExecutor(IN_FLIGHT)
        self._pending: set[Future[dict[str, Any]]] = set()

    def widths(self) -> dict[str, int]:
        return self._worker.widths()

    def submit(self, root: Path, plan: Plan, shard: ShardInput) -> None:
        self._pending.add(self._threads.submit(self._worker.harvest, root, plan, shard))

    def collect(self) -> list[dict[str, Any]]:
        done, self._pending = wait(self._pending, timeout=POLL_SECONDS, return_when=FIRST_COMPLETED)
        return [future.result() for future in done]

    def rows_done(self) -> int:
        return self._worker.rows_done()

    def close(self) -> None:
        self._worker.stop()
        self._threads.shutdown(cancel_futures=True)


class RayPool:
    """Ray actors, each with its share of the cores or one GPU, in a Ray of our own."""

    def __init__(self, workers: int, **worker: Any) -> None:
        import ray

        self._ray = ray
        cores = os.cpu_count() or 1
        if workers > cores:
            raise RunError(f"--workers {workers} is more than the {cores} cores of this machine.")
        gpus = 1 if worker["device"] == "cuda" else 0
        threads = max(1, cores // workers)
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        # Ray puts the driver's folder first on its workers' path, where a user's own store.py
        # or train.py would be taken for our packages: start it from an empty folder.
        self._empty = tempfile.TemporaryDirectory(prefix="harvest-")
        self._actors: list[Any] = []
        self._pending: dict[Any, int] = {}  # reference → index of the actor
        self.capacity = IN_FLIGHT * workers
        try:
            with contextlib.chdir(self._empty.name):
                ray.init(
                    address="local",
                    num_cpus=cores,
                    include_dashboard=False,
                    log_to_driver=False,
                    logging_level="ERROR",
                    object_store_memory=OBJECT_STORE_BYTES,
                    runtime_env={"env_vars": KEEP_MEMORY},
                    _node_ip_address="127.0.0.1",  # all of it is on this machine
                )
        except KeyboardInterrupt:
            self.close()
            raise
        except Exception as error:  # sockets, memory, time: Ray raises at will
            self.close()
            reason = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
            raise RunError(
                f"Ray could not be started ({reason}); use --workers 0 to do without it."
            ) from error
        actor = ray.remote(ShardWorker).options(
            num_cpus=threads,
            num_gpus=gpus,
            max_concurrency=IN_FLIGHT + 1,  # one more answers `rows_done`
            max_restarts=3,
            max_task_retries=3,
        )
        self._actors = [actor.remote(threads=threads, **worker) for _ in range(workers)]

    def widths(self) -> dict[str, int]:
        return self._get([actor.widths.remote() for actor in self._actors])[0]

    def submit(self, root: Path, plan: Plan, shard: ShardInput) -> None:
        load = [list(self._pending.values()).count(i) for i in range(len(self._actors))]
        chosen = load.index(min(load))
        self._pending[self._actors[chosen].harvest.remote(root, plan, shard)] = chosen

    def collect(self) -> list[dict[str, Any]]:
        done, _ = self._ray.wait(list(self._pending), timeout=POLL_SECONDS)
        for reference in done:
            del self._pending[reference]
        return self._get(done)

    def rows_done(self) -> int:
        return sum(self._get([actor.rows_done.remote() for actor in self._actors]))

    def close(self) -> None:
        """Stop the workers between two batches, so that none writes once this returns."""
        try:
            ending = [*(actor.stop.remote() for actor in self._actors), *self._pending]
            if ending:
                self._ray.wait(ending, num_returns=len(ending), timeout=STOP_SECONDS)
        finally:
            self._ray.shutdown()
            self._empty.cleanup()

    def _get(self, references: list[Any]) -> list[Any]:
        try:
            return self._ray.get(references)
        except self._ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, SaeHarvestError):
                raise error.cause from None
            raise
        except self._ray.exceptions.RayError as error:
            reason = str(error).strip().splitlines()[-1].strip().rstrip(".")
            raise RunError(
                f"A worker died and could not be restarted ({reason}); what is "
                "committed is safe: run the same command again, with fewer --workers if memory "
                "ran out."
            ) from error


@contextlib.contextmanager
def open_pool(
    workers: int, model: ResolvedModel, sites: tuple[str, ...], compute_dtype: str, device: str
) -> Iterator[Pool]:
    """Workers with the model loaded; 0 means this process, without Ray."""
    worker = {
        "model": model,
        "sites": sites,
        "compute_dtype": compute_dtype,
        "device": device,
    }
    pool: Pool = RayPool(workers, **worker) if workers else LocalPool(**worker)
    try:
        yield pool
    finally:
        pool.close()
