"""Shared helpers for Ray: connect, size the workers, explain why a worker is gone."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import threading
from collections.abc import Iterator
from typing import Any

import ray
from ray.exceptions import (
    ActorUnavailableError,
    NodeDiedError,
    OutOfMemoryError,
    RayError,
    RayTaskError,
)

from sae_harvest.common import environment, private_apis
from sae_harvest.common.errors import RunError, SaeHarvestError
from sae_harvest.common.memory import KEEP_MEMORY

OBJECT_STORE_BYTES = 256 << 20  # shards travel as token ids, not as activations

CONNECT_SECONDS = 10.0


def connect(address: str | None, workers: int, without: str) -> None:
    """Join the cluster at an address, or start Ray on this machine.

    Several runs can share a cluster: each is a Ray job with a namespace of its own.

    Args:
        address: address of the cluster's head; None starts Ray on this machine.
        workers: number of workers that the run will request, each with at least one core.
        without: how to run without Ray, as advice in an error message.

    Raises:
        RunError: this machine has fewer cores than workers, or Ray cannot be started or joined.
    """
    environment.set_defaults()
    cores = os.cpu_count() or 1
    if address is None and workers > cores:
        raise RunError(f"--workers {workers} is more than the {cores} cores of this machine.")
    common: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
    own = {
        "address": "local",
        "num_cpus": cores,
        "include_dashboard": False,
        "object_store_memory": OBJECT_STORE_BYTES,
    } | private_apis.RAY_ON_THIS_MACHINE
    if address not in (None, "auto"):
        _check_listening(str(address))
    chosen = own if address is None else {"address": address}
    try:
        with _own_sigterm():
            ray.init(runtime_env={"env_vars": KEEP_MEMORY}, **chosen, **common)
        private_apis.silence_ray_workers()
    except (KeyboardInterrupt, SystemExit, RunError):
        ray.shutdown()
        raise
    except Exception as error:  # Ray raises many types: sockets, memory, timeouts
        ray.shutdown()
        why = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
        if address is None:
            raise RunError(f"Ray could not be started ({why}); {without}.") from error
        raise _not_joined(address, why) from error


@contextlib.contextmanager
def connected(
    address: str | None, workers: int, without: str = "use --workers 0 to do without it"
) -> Iterator[None]:
    """Connect while the block runs; then stop our own Ray, or our workers on a cluster."""
    connect(address, workers, without)
    try:
        yield
    finally:
        ray.shutdown()


def start_actor(cls: type, threads: int, gpu: bool, at_once: int, strategy: Any) -> Any:
    """Start an actor with some cores and perhaps a GPU, without restarts or retries by Ray.

    Args:
        cls: class of the actor.
        threads: number of its cores.
        gpu: whether it gets a GPU.
        at_once: number of calls that it handles at a time.
        strategy: Ray's scheduling strategy.
    """
    options = {"num_cpus": threads, "num_gpus": int(gpu), "max_concurrency": at_once}
    never = {"max_restarts": 0, "max_task_retries": 0}
    return ray.remote(cls).options(**options, **never, scheduling_strategy=strategy).remote()


def answer(reference: Any) -> Any:
    """Return the answer of a worker.

    Raises:
        SaeHarvestError: the error that the worker raised.
        RayTaskError: another error in the worker, which is a bug.
        RayError: the worker is gone; see `reason`.
    """
    try:
        return ray.get(reference)
    except RayTaskError as error:
        if isinstance(error.cause, SaeHarvestError):
            raise error.cause from None
        raise


def _check_listening(address: str) -> None:
    """Raise `RunError` if nothing listens at an address: Ray would try for minutes, then exit."""
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


def threads_per_worker(workers: int, gpu: bool) -> int:
    """Return the number of cores for each worker: the most with which all can be placed.

    Raises:
        RunError: there is no room for all workers.
    """
    nodes = _nodes()
    if threads := share(nodes, workers, gpu):
        return threads
    need = "one GPU and a core" if gpu else "a core"
    raise RunError(f"--workers {workers}: each needs {need}, and {resources()}; use fewer.")


def share(nodes: list[tuple[int, int]], workers: int, gpu: bool) -> int | None:
    """Return the most cores per worker with which all fit on nodes of (cores, GPUs), or None.

    Each worker is on one node, with its own GPU if `gpu`.
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
    """Return the cores, GPUs and machines of the Ray cluster, in words."""
    nodes = _nodes()
    free = ray.available_resources()
    counts = [f"{sum(c for c, _ in nodes)} cores ({free.get('CPU', 0):.0f} free)"]
    if gpus := sum(g for _, g in nodes):
        counts.append(f"{gpus} GPUs ({free.get('GPU', 0):.0f} free)")
    return f"Ray has {' and '.join(counts)} on {len(nodes)} machine{'s' * (len(nodes) != 1)}"


def reason(error: RayError) -> str:
    """Return a short reason why an actor is gone; Ray's own texts are long and uncertain."""
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


def missing_module(error: BaseException) -> str | None:
    """Return the missing module because of which a worker could not start, or None."""
    found = re.search(r"No module named '([^']+)'", str(error))
    return found[1] if found else None


def has_gpus(workers: int) -> bool:
    """Whether the cluster has a GPU for each of `workers` workers."""
    return share(_nodes(), workers, gpu=True) is not None


def _nodes() -> list[tuple[int, int]]:
    """Return the cores and GPUs of every living node."""
    found = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return [(int(r.get("CPU", 0)), int(r.get("GPU", 0))) for r in found]


@contextlib.contextmanager
def _own_sigterm() -> Iterator[None]:
    """Restore the handler of SIGTERM, which Ray replaces by one that exits with code 15.

    A signal that arrives meanwhile is passed to the original handler as well.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # Ray does not replace it in other threads
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
