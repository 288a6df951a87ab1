"""One run on many processes, which are Ray actors on this machine or on a cluster.

The user's command starts the workers, shows their progress, and reports the one error that matters
at the end. It communicates with them through the run's folder, which all machines must share:

    OUT/.driver-<number>.tmp   made before the workers start; each worker has to see it
    OUT/.stop-<number>.tmp     made when the command is asked to stop
    OUT/metrics.jsonl          progress of the run
"""

from __future__ import annotations

import contextlib
import math
import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError
from ray.util.placement_group import placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from sae_harvest.common import ray_cluster as cluster
from sae_harvest.common.atomic import make_folder
from sae_harvest.common.errors import RunError, SaeHarvestError
from sae_harvest.train.config import TrainConfig
from sae_harvest.train.parallel.actor import Place, TrainActor
from sae_harvest.train.parallel.distributed import Parallel, passing
from sae_harvest.train.parallel.worker import Assignment, Failure
from sae_harvest.train.run.checkpoint import saved_steps
from sae_harvest.train.run.faults import explained
from sae_harvest.train.run.files import read_record
from sae_harvest.train.run.folder import EVALUATION_FILE, METRICS_FILE
from sae_harvest.train.run.interrupt import Interruption
from sae_harvest.train.run.metrics import last_metrics
from sae_harvest.train.run.records import Evaluation
from sae_harvest.train.run.trainer import OnPhase, RunResult, silent

POLL_SECONDS = 0.2
START_SECONDS = 600.0  # limit for room on the cluster, and again for the start of the workers
ECHO_SECONDS = 10.0  # wait for the failed worker's message after the echoes of others
WITHOUT = "leave out --workers to train in one process"


def train_on_workers(
    config: TrainConfig,
    store: str | Path,
    out: str | Path,
    site: str | None = None,
    device: str = "auto",
    *,
    workers: int,
    parallel: Parallel,
    address: str | None = None,
    report: OnPhase = silent,
) -> RunResult:
    """Train with several workers, each with a GPU or a share of the cores; see `trainer.train`.

    The run is the same with any number of workers and either way of division, so another number of
    workers can continue it.

    Args:
        device: cuda, cpu, or auto: cuda if every worker can have a GPU.
        workers: number of workers.
        parallel: what the workers divide, latents or data.
        address: address of a Ray cluster's head, or auto; None starts Ray on this machine.

    Raises:
        SaeHarvestError: an error of `train`, or a worker is gone (a retry may help).
    """
    out = Path(out).absolute()
    with explained(out):
        make_folder(out)
    with explained(out), cluster.connected(address, workers, WITHOUT):
        gpu = device == "cuda" or (device == "auto" and cluster.has_gpus(workers))
        assignment = Assignment(
            config=config.model_dump(mode="json"),
            store=str(store) if "://" in str(store) else str(Path(store).absolute()),
            out=str(out),
            site=site,
            device="cuda" if gpu else "cpu",
            parallel=parallel,
            workers=workers,
            threads=cluster.threads_per_worker(workers, gpu),
            number=secrets.token_hex(8),
        )
        assignment.seen.touch()
        try:
            return _watched(assignment, config.steps, report)
        finally:
            assignment.seen.unlink(missing_ok=True)
            assignment.stop.unlink(missing_ok=True)


def _watched(assignment: Assignment, steps: int, report: OnPhase) -> RunResult:
    """Start the workers and wait for their end, or for a signal to stop them."""

    def show() -> None:
        _show(assignment, steps, report)

    actors = _actors(assignment, show)
    places = _answers([actor.place.remote() for actor in actors], show, START_SECONDS)
    # ranks of one machine follow each other, so that few sums cross between machines
    order = sorted(range(len(actors)), key=lambda n: places[n].node)
    actors, places = [actors[n] for n in order], [places[n] for n in order]
    with Interruption() as interruption:

        def watch() -> None:
            if interruption.asked and not assignment.stop.exists():
                assignment.stop.touch()
            show()

        task, devices = asdict(assignment), visible_devices(places)
        asked = [
            actor.train.remote(task, rank, places[0], devices[rank])
            for rank, actor in enumerate(actors)
        ]
        _answers(asked, watch)
    return _result(Path(assignment.out), steps, interruption.signal)


def _actors(assignment: Assignment, show: Callable[[], None]) -> list[Any]:
    """Start the actors once Ray has room for all: two runs never wait for each other."""
    gpu = assignment.device == "cuda"
    resources = {"CPU": assignment.threads} | ({"GPU": 1} if gpu else {})
    room = placement_group([resources] * assignment.workers, strategy="PACK")
    limit = time.monotonic() + START_SECONDS
    while not room.wait(1):
        show()
        if time.monotonic() > limit:
            raise _late(assignment.workers)
    # With two threads methods do not run in the main thread, where they would take signals.
    return [
        cluster.start_actor(
            TrainActor, assignment.threads, gpu, 2, PlacementGroupSchedulingStrategy(room, place)
        )
        for place in range(assignment.workers)
    ]


def _answers(
    asked: Sequence[Any], watch: Callable[[], None], seconds: float = math.inf
) -> list[Any]:
    """Return the answers of the workers by rank. `watch` is called while waiting.

    Raises:
        SaeHarvestError: a worker failed or is gone, or there is no answer in time.
    """
    pending = {reference: rank for rank, reference in enumerate(asked)}
    answers: dict[int, Any] = {}
    failures: dict[int, Failure | BaseException] = {}
    limit = time.monotonic() + seconds
    while pending and all(map(_is_echo, failures.values())) and time.monotonic() < limit:
        watch()
        for reference in ray.wait(list(pending), timeout=POLL_SECONDS)[0]:
            rank = pending.pop(reference)
            try:
                answers[rank] = ray.get(reference)
            except RayError as error:
                failures[rank] = error
                continue
            if isinstance(answers[rank], Failure):
                failures[rank] = answers[rank]
                limit = min(limit, time.monotonic() + ECHO_SECONDS)
    if failures:
        raise _reported(failures)
    if pending:
        raise _late(len(asked))
    return [answers[rank] for rank in range(len(asked))]


def _late(workers: int) -> RunError:
    why = f"{workers} workers did not come up within {START_SECONDS:.0f} s; {cluster.resources()}"
    found = RunError(f"{why}. Run the same command again when there is room.")
    found.__cause__ = passing(why)
    return found


def visible_devices(places: Sequence[Place]) -> list[str | None]:
    """Return CUDA_VISIBLE_DEVICES of each worker: its own GPU, then those of others on its machine.

    NCCL copies directly between GPUs that a process sees. The own GPU comes first, so that `cuda`
    means this GPU in every thread. None for a worker without a GPU.
    """
    found: list[str | None] = []
    for own in places:
        others = [p.gpu for p in places if p.node == own.node and p is not own and p.gpu]
        found.append(",".join([own.gpu, *others]) if own.gpu else None)
    return found


def _result(out: Path, steps: int, number: int | None) -> RunResult:
    """Return the result of a run from its folder; `number` is the signal that stopped it."""
    done = max(saved_steps(out), default=0)
    metrics = _metrics(out)
    if done < steps:
        return RunResult(done, False, metrics, None, number)
    remedy = "run the same command again"
    found = read_record(out / EVALUATION_FILE, Evaluation, "The run", remedy)
    return RunResult(done, True, metrics, found)


def _is_echo(failure: Failure | BaseException) -> bool:
    return isinstance(failure, Failure) and failure.is_echo


def _reported(failures: dict[int, Failure | BaseException]) -> BaseException:
    """Return the error that best says why the run ended; failures are given by rank."""
    sentences = [found for found in failures.values() if isinstance(found, Failure)]
    for found in sentences:
        if not found.is_echo:
            return _sentence(found)
    for rank, error in failures.items():
        if not isinstance(error, Failure):
            return _gone(rank, error)
    return _sentence(sentences[0])


def _sentence(failure: Failure) -> SaeHarvestError:
    found = RunError(failure.sentence)
    if failure.passes:
        found.__cause__ = passing(failure.sentence)
    return found


def _gone(rank: int, error: BaseException) -> BaseException:
    """Return the error for a worker that ended without a message of its own."""
    if module := cluster.missing_module(error):
        return RunError(
            f"Worker {rank} found no {module} on its machine; install the same version of "
            "sae-harvest on every node, in the Python that its Ray runs in."
        )
    if isinstance(error, RayTaskError) or not isinstance(error, RayError):
        return error
    why = cluster.reason(error)
    found = RunError(
        f"Worker {rank} is gone ({why}); the same command continues from the last checkpoint."
    )
    found.__cause__ = passing(why)
    return found


def _show(assignment: Assignment, steps: int, report: OnPhase) -> None:
    """Report the progress of the run from its metrics."""
    last = _metrics(Path(assignment.out))
    if not last:
        report("preparing", 0, steps, "")
    else:
        phase = "training" if last["step"] < steps else "evaluating"
        report(phase, last["step"], steps, f"{last['tokens_per_second']:,} tokens/s")


def _metrics(out: Path) -> dict[str, Any]:
    """Return the newest metrics; empty if there are none or the file cannot be read now."""
    with contextlib.suppress(OSError):
        return last_metrics(out / METRICS_FILE)
    return {}
