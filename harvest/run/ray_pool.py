"""Ray actors that harvest shards, on this machine or on a cluster; a dead actor is replaced.

Ray itself restarts and retries nothing here. One place decides which worker gets a shard after a
death, so that a shard that kills its workers is found and named.
"""

from __future__ import annotations

import contextlib
import time
from collections import Counter, deque
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError

from sae_harvest.common import ray_cluster as cluster
from sae_harvest.common.errors import RunError
from sae_harvest.harvest.model.models import ResolvedModel
from sae_harvest.harvest.run import ray_nodes
from sae_harvest.harvest.run.actor import ShardActor
from sae_harvest.harvest.run.log import Notify
from sae_harvest.harvest.run.pool import POLL_SECONDS, done_sentence
from sae_harvest.harvest.run.prepare import model_name
from sae_harvest.harvest.run.worker import IN_FLIGHT, Done
from sae_harvest.store.layout import Plan
from sae_harvest.store.objects import Objects
from sae_harvest.store.writer import Shard

START_SECONDS = 300.0  # without any worker; torch from a cold network drive takes a minute
STOP_SECONDS = 5.0
DEATHS = 3  # workers that may die with one shard, or in a row while they load the model


@dataclass(eq=False)
class _Worker:
    """An actor, from the request for it on: it starts, then loads the model, then works."""

    actor: Any
    """Handle of a `ShardActor`."""
    name: str
    """Its name in the log."""
    starting: Any
    """Reference of `start`; None once it has answered."""
    loading: Any = None
    """Reference of `widths`; None before and after."""
    at_work: bool = False
    """True once it has loaded the model."""
    shards: dict[Any, int] = field(default_factory=dict)
    """Reference of `harvest` to the number of the shard."""
    rows_asked: Any = None
    """Reference of `rows_done`; None if no call is pending."""
    rows: int = 0
    """Rows through its model."""
    rows_finished: int = 0
    """Rows of shards that it has published."""


class RayPool:
    """A pool of Ray actors, each with its share of the cores or one GPU.

    Implements `harvest.run.pool.Pool`. Ray has to be connected.
    """

    def __init__(
        self,
        workers: int,
        address: str | None,
        report: Notify,
        model: ResolvedModel,
        sites: tuple[str, ...],
        compute_dtype: str,
        device: str,
    ) -> None:
        self.capacity = IN_FLIGHT * workers
        self._report = report
        self._workers: list[_Worker] = []
        self._n_hired = 0
        self._widths: dict[str, int] | None = None
        self._inputs: dict[int, tuple[Objects, Plan, Shard]] = {}  # inputs of the shards in flight
        self._waiting: deque[int] = deque()  # shards in flight that no worker has
        self._deaths: Counter[int] = Counter()  # shard → workers that died with it
        self._failed_starts = 0  # in a row
        self._nobody_since: float | None = None
        self._rows_of_dead = 0
        self._gpu = device == "cuda"
        self._threads = cluster.threads_per_worker(workers, self._gpu)
        self._expected = ray_nodes.versions()
        if address is not None:
            model = replace(model, name=model_name(model))
        # The model is a plain dict, because a node with other versions has to read it.
        self._worker = {
            "model": asdict(model),
            "sites": sites,
            "compute_dtype": compute_dtype,
            "device": device,
            "threads": self._threads,
            "elsewhere": address is not None,
        }
        for _ in range(workers):
            self._hire()

    def widths(self) -> dict[str, int]:
        while self._widths is None:
            self._poll(POLL_SECONDS)
        return self._widths

    def submit(self, objects: Objects, plan: Plan, shard: Shard) -> None:
        self._inputs[shard.number] = objects, plan, shard
        self._waiting.append(shard.number)
        self._assign()

    def collect(self) -> list[dict[str, Any]]:
        return self._poll(POLL_SECONDS if self._inputs else 0)

    def in_flight(self) -> list[int]:
        return sorted(self._inputs)

    def rows_done(self) -> int:
        """Count rows without waiting: each call reads the results requested by the call before."""
        questions = {w.rows_asked: w for w in self._workers if w.rows_asked is not None}
        ready = (
            ray.wait(list(questions), num_returns=len(questions), timeout=0)[0] if questions else []
        )
        errors = {}
        for reference in ready:
            worker = questions[reference]
            worker.rows_asked = None
            try:
                worker.rows = ray.get(reference)
            except RayTaskError:
                raise
            except RayError as error:
                if not worker.shards:  # else the shards' calls report it, and one may be done
                    errors[worker] = error
        self._bury(errors)
        for worker in self._workers:
            if worker.at_work and worker.rows_asked is None:
                worker.rows_asked = worker.actor.rows_done.remote()
        return self._rows_of_dead + sum(max(w.rows, w.rows_finished) for w in self._workers)

    def close(self) -> None:
        """Stop the workers between two blocks; after this returns, no worker writes."""
        ending = [reference for w in self._workers for reference in w.shards]
        ending += [w.actor.stop.remote() for w in self._workers if w.at_work]
        if ending:
            ray.wait(ending, num_returns=len(ending), timeout=STOP_SECONDS)
        for worker in self._workers:
            with contextlib.suppress(RayError):  # dead already
                ray.kill(worker.actor)

    def _hire(self) -> None:
        """Request one more worker; it joins when Ray has placed it and it has loaded the model."""
        self._n_hired += 1
        at_once = IN_FLIGHT + 1  # one more answers `rows_done`
        actor = cluster.start_actor(ShardActor, self._threads, self._gpu, at_once, "SPREAD")
        starting = actor.start.remote(self._expected, self._worker)
        self._workers.append(_Worker(actor, f"worker {self._n_hired}", starting))

    def _assign(self) -> None:
        """Assign the waiting shards, the least busy worker first.

        A shard with which a worker has died gets a worker of its own, so that another death shows
        that this shard is the cause.
        """
        for shard in list(self._waiting):
            alone = self._deaths[shard] > 0
            room = 1 if alone else IN_FLIGHT
            free = [
                w
                for w in self._workers
                if w.at_work
                and len(w.shards) < room
                and not any(self._deaths[other] for other in w.shards.values())
            ]
            if not free:
                return
            worker = min(free, key=lambda w: len(w.shards))
            self._waiting.remove(shard)
            worker.shards[worker.actor.harvest.remote(*self._inputs[shard])] = shard

    def _poll(self, seconds: float) -> list[dict[str, Any]]:
        """Wait up to `seconds` for results; process them; return records of finished shards."""
        self._look_for_workers()
        self._assign()
        of = {reference: w for w in self._workers for reference in _references(w)}
        if not of:
            return []
        if ray.wait(list(of), timeout=seconds)[0]:  # returns with the first
            ready, _ = ray.wait(list(of), num_returns=len(of), timeout=0)
        else:
            ready = []
        records: list[dict[str, Any]] = []
        errors: dict[_Worker, RayError] = {}
        for reference in ready:
            worker = of[reference]
            try:
                answer = cluster.answer(reference)
            except RayTaskError:
                raise
            except RayError as error:
                if problem := ray_nodes.without_package(error):
                    raise RunError(problem) from None
                errors[worker] = error
                continue
            if reference == worker.starting:
                self._started(worker, answer)
            elif reference == worker.loading:
                worker.loading, worker.at_work = None, True
                self._widths = answer
                self._failed_starts = 0
            else:
                records.append(self._finished(worker, reference, answer))
        self._bury(errors)
        self._assign()
        return records

    def _started(self, worker: _Worker, node: dict[str, Any]) -> None:
        worker.starting = None
        worker.name += f" on {node['host']} (pid {node['pid']})"
        if problem := ray_nodes.mismatch(self._expected, node):
            if self._widths is None:
                raise RunError(problem)
            # A new machine with wrong software must not end the work of the others.
            self._dismiss(worker, problem)
            return
        worker.loading = worker.actor.widths.remote()
        self._report(f"{worker.name} started with {self._threads} threads")

    def _finished(self, worker: _Worker, reference: Any, done: Done) -> dict[str, Any]:
        shard = worker.shards.pop(reference)
        del self._inputs[shard], self._deaths[shard]
        worker.rows_finished += done.record["rows"]
        self._report(done_sentence(done, worker.name))
        return done.record

    def _bury(self, errors: dict[_Worker, RayError]) -> None:
        """Take the shards of dead workers back, and request new workers."""
        for worker, error in errors.items():
            reason = cluster.reason(error)
            shards = sorted(worker.shards.values())
            self._waiting.extendleft(reversed(shards))
            self._deaths.update(shards)
            goes = f"; {_named(shards)} to be done by another" if shards else ""
            self._dismiss(worker, f"{reason}{goes}")
            for shard in shards:
                if self._deaths[shard] >= DEATHS:
                    raise RunError(
                        f"Shard {shard} has killed {DEATHS} workers, the last because {reason}; "
                        "committed shards are safe: run the same command again with fewer "
                        "--workers or on a machine with more memory."
                    )

    def _dismiss(self, worker: _Worker, why: str) -> None:
        self._workers.remove(worker)
        self._rows_of_dead += worker.rows_finished
        with contextlib.suppress(RayError):  # it may be alive but unreachable
            ray.kill(worker.actor)
        self._report(f"{worker.name} is gone: {why}")
        self._failed_starts += not worker.at_work
        if self._failed_starts < DEATHS:
            self._hire()
        elif not self._workers:
            raise RunError(
                f"{DEATHS} workers in a row died before they had loaded the model, the last "
                f"because {why}; use fewer --workers or a machine with more memory."
            )

    def _look_for_workers(self) -> None:
        """Raise `RunError` if there has been no worker for too long."""
        if any(w.starting is None for w in self._workers):
            self._nobody_since = None
        elif self._nobody_since is None:
            self._nobody_since = time.monotonic()
        elif time.monotonic() - self._nobody_since > START_SECONDS:
            raise RunError(
                f"No worker started within {START_SECONDS:.0f} s; {cluster.resources()}. "
                "Committed shards are safe: run the same command again when there is room."
            )


def _references(worker: _Worker) -> list[Any]:
    """Return the references of a worker's pending calls."""
    first = [r for r in (worker.starting, worker.loading) if r is not None]
    return [*first, *worker.shards]


def _named(shards: list[int]) -> str:
    return f"shard{'s' * (len(shards) > 1)} {' and '.join(map(str, shards))}"
