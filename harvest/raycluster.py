"""What `harvest.raypool` asks of Ray: a connection, room for workers, and the actors' class."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import ActorUnavailableError, NodeDiedError, OutOfMemoryError, RayError

from harvest.prepare import LIBRARIES
from store.errors import RunError
from store.paths import cache_dir

OBJECT_STORE_BYTES = 256 << 20  # shards travel as token ids, not as activations

CONNECT_SECONDS = 10.0

# glibc gives every tensor of a megabyte or more back to the system when it is freed, and in a Ray
# worker takes it anew, page by page, for the next operator: a sixth of the time of a forward
# pass on a processor. With these a worker keeps what it has had once.
KEEP_MEMORY = {
    "MALLOC_MMAP_THRESHOLD_": str(1 << 30),
    "MALLOC_TRIM_THRESHOLD_": str(1 << 40),
    "MALLOC_ARENA_MAX": "1",
}


def connect(address: str | None) -> None:
    """Join the cluster at an address, or start a Ray of our own for None; `RunError` if it fails.

    Several harvests can share a cluster: each is a Ray job with a namespace of its own.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    common: dict[str, Any] = {
        "log_to_driver": False,
        "logging_level": "ERROR",
        "runtime_env": {"env_vars": KEEP_MEMORY},
    }
    own = {
        "address": "local",
        "num_cpus": os.cpu_count() or 1,
        "include_dashboard": False,
        "object_store_memory": OBJECT_STORE_BYTES,
        "_node_ip_address": "127.0.0.1",  # all of it is on this machine
    }
    if address not in (None, "auto"):
        _check_listening(str(address))
    chosen = own if address is None else {"address": address}
    try:
        # Ray puts the driver's folder first on its workers' path, where a user's own store.py
        # or train.py would be taken for our packages: start it from an empty folder.
        with contextlib.chdir(_empty_folder()), _own_sigterm():
            ray.init(**chosen, **common)
        # Ray prints every death to standard output, `log_to_driver` or not, but where its own
        # debugger has set this; what there is to say of them is in our log.
        ray._private.worker._worker_logs_enabled = False
    except (KeyboardInterrupt, SystemExit, RunError):
        ray.shutdown()
        raise
    except Exception as error:  # sockets, memory, time: Ray raises at will
        ray.shutdown()
        why = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
        if address is None:
            remedy = "use --workers 0 to do without it"
            raise RunError(f"Ray could not be started ({why}); {remedy}.") from error
        raise _not_joined(address, why) from error


def _check_listening(address: str) -> None:
    """`RunError` if nothing listens there: Ray itself would try for minutes, then exit."""
    host, separator, port = address.rpartition(":")
    if not separator or "/" in address or not port.isdecimal():
        raise RunError(f"--address {address}: expected auto, or HOST:PORT of the cluster's head.")
    try:
        socket.create_connection((host.strip("[]"), int(port)), CONNECT_SECONDS).close()
    except (OSError, OverflowError) as error:
        raise _not_joined(address, str(error)) from error


def _not_joined(address: str, why: str) -> RunError:
    return RunError(
        f"The Ray cluster at {address} could not be joined ({why}); give the address that "
        "`ray start --head` printed, on a machine that is part of the cluster."
    )


def threads_per_worker(workers: int, gpu: bool, local: bool) -> int:
    """Cores for each worker: as many as there are, so that all of them can be placed.

    Raises:
        RunError: there is no room for so many workers, or for any with a GPU.
    """
    nodes = _nodes()
    if threads := share(nodes, workers, gpu):
        return threads
    if local and not gpu:
        cores = sum(cpus for cpus, _ in nodes)
        raise RunError(f"--workers {workers} is more than the {cores} cores of this machine.")
    need = "one GPU and a core" if gpu else "a core"
    raise RunError(f"--workers {workers}: each needs {need}, and {resources()}; use fewer.")


def share(nodes: list[tuple[int, int]], workers: int, gpu: bool) -> int | None:
    """The most cores with which so many workers can be placed on nodes of (cores, GPUs).

    Each worker is on one node, with a GPU of its own if `gpu`; None if there is no room for all.
    """
    most = max((cores for cores, _ in nodes), default=0)
    if gpu:  # leave the other GPUs of a node their cores
        most = max((max(1, cores // gpus) for cores, gpus in nodes if gpus), default=0)
    for threads in range(most, 0, -1):
        places = [cores // threads for cores, _ in nodes]
        if gpu:
            places = [min(n, gpus) for n, (_, gpus) in zip(places, nodes, strict=True)]
        if sum(places) >= workers:
            return threads
    return None


def resources() -> str:
    """What Ray has, in words."""
    nodes = _nodes()
    free = ray.available_resources()
    counts = [f"{sum(c for c, _ in nodes)} cores ({free.get('CPU', 0):.0f} free)"]
    if gpus := sum(g for _, g in nodes):
        counts.append(f"{gpus} GPUs ({free.get('GPU', 0):.0f} free)")
    return f"Ray has {' and '.join(counts)} on {len(nodes)} machine{'s' * (len(nodes) != 1)}"


def reason(error: RayError) -> str:
    """Why an actor is gone, in words: Ray's own texts are long and guess."""
    text = str(error)
    if isinstance(error, OutOfMemoryError) or "low on memory" in text or "memory pressure" in text:
        return "its machine ran out of memory"
    if isinstance(error, NodeDiedError) or "node has died" in text or "node died" in text:
        return "its machine is gone"
    if isinstance(error, ActorUnavailableError):
        return "it cannot be reached"
    if "connection error" in text or "SIGKILL" in text:
        return "its process was killed, perhaps for lack of memory"
    return (text.strip().splitlines() or [type(error).__name__])[-1].strip().rstrip(".")


def actor_class() -> type:
    """The class of the actors.

    Made in a function and standing on nothing of ours, it travels by value: a machine without
    our packages, or with other versions, can say so.
    """

    class ShardWorker:
        """`harvest.worker.ShardWorker`, once it is known that it is the driver's."""

        @staticmethod
        def versions(libraries: list[str]) -> dict[str, str | None]:
            """Of the libraries on this machine; builds for other devices are no other version."""
            from importlib.metadata import PackageNotFoundError, version

            found: dict[str, str | None] = {}
            for name in libraries:
                try:
                    found[name] = version(name).partition("+")[0]
                except PackageNotFoundError:
                    found[name] = None
            return found

        def start(self, expected: dict[str, str], worker: dict[str, Any]) -> dict[str, Any]:
            import os
            import platform

            found = self.versions(list(expected))
            if found == expected:
                from harvest.models import ResolvedModel
                from harvest.worker import ShardWorker as Worker

                model = ResolvedModel(**worker["model"])
                self._worker = Worker(**(worker | {"model": model}))
            return {"host": platform.node(), "pid": os.getpid(), "versions": found}

        def widths(self) -> Any:
            return self._worker.widths()

        def harvest(self, objects: Any, plan: Any, shard: Any) -> Any:
            return self._worker.harvest(objects, plan, shard)

        def rows_done(self) -> int:
            return self._worker.rows_done()

        def stop(self) -> None:
            self._worker.stop()

    return ShardWorker


def versions() -> dict[str, str]:
    """Of the libraries that decide the bytes, on this machine."""
    return actor_class().versions(list(LIBRARIES))  # type: ignore[attr-defined]


def mismatch(expected: dict[str, str], there: dict[str, Any]) -> str | None:
    """A sentence about what a worker's machine lacks to give the driver's bytes, or None."""
    found = there["versions"]
    if found == expected:
        return None
    host = there["host"]
    if found["sae-harvest"] is None:
        return (
            f"The Ray node {host} has no sae-harvest; install version {expected['sae-harvest']} "
            "there, in the Python that its Ray runs in."
        )
    differing = [
        f"{name} {found[name] or 'missing'} instead of {expected[name]}"
        for name in expected
        if found[name] != expected[name]
    ]
    return f"The Ray node {host} has {', '.join(differing)}; install the same on every node."


def _nodes() -> list[tuple[int, int]]:
    """Cores and GPUs of every living node."""
    found = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return [(int(r.get("CPU", 0)), int(r.get("GPU", 0))) for r in found]


def _empty_folder() -> Path:
    """A folder with nothing in it, always the same, so that a killed driver leaves none behind."""
    folder = cache_dir() / "empty"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        found = next(folder.iterdir(), None)
    except OSError as error:
        raise RunError(
            f"{folder} can't be made ({error.strerror}); set SAE_HARVEST_CACHE to another folder."
        ) from error
    if found is not None:
        raise RunError(f"{folder} has to stay empty; move {found.name} elsewhere.")
    return folder


@contextlib.contextmanager
def _own_sigterm() -> Iterator[None]:
    """Put the handler of SIGTERM back: Ray replaces it by one that exits with code 15.

    A signal that comes while Ray's is in place is given to the one before as well.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # there Ray leaves it alone
        return
    handler = signal.getsignal(signal.SIGTERM)
    try:
        yield
    except SystemExit:
        if callable(handler):
            handler(signal.SIGTERM, None)
        raise
    finally:
        signal.signal(signal.SIGTERM, handler)
