"""From a request to a sealed store: plan, distribute shards, commit, seal; extend and repair."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sae_harvest.common.device import choose_device
from sae_harvest.common.errors import InputError
from sae_harvest.harvest.run.config import HarvestConfig
from sae_harvest.harvest.run.log import HarvestLog
from sae_harvest.harvest.run.pool import Pool, open_pool
from sae_harvest.harvest.run.prefetch import Ahead
from sae_harvest.harvest.run.prepare import ALL_SHARDS, Prepared, prepare, prepare_again, versions
from sae_harvest.harvest.run.status import Heartbeat
from sae_harvest.harvest.text.folders import left_out_sentence
from sae_harvest.harvest.tokens.shards import missing, runs, shard_inputs
from sae_harvest.store import layout
from sae_harvest.store.commits import commit_shard, committed_shards, read_commit, read_plan
from sae_harvest.store.layout import Plan
from sae_harvest.store.maintenance.repair import (
    mend_commit,
    remove_damaged,
    remove_untrusted,
    reseal,
    restore_plan,
)
from sae_harvest.store.maintenance.verify import Verification, verify
from sae_harvest.store.objects import Objects, open_objects, require_space
from sae_harvest.store.records import digest_of
from sae_harvest.store.seals import seal, trusted_commits
from sae_harvest.store.writer import Shard, check_place, check_same, create_store, discard

SMALL_BYTES_PER_ROW = 16  # upper estimate of tokens, norms, tables and commit records

OnProgress = Callable[[int, int | None], None]  # rows done in this run, rows to do (None: unknown)
Notify = Callable[[str], None]
Keep = Callable[[dict[str, Any]], object]  # receives a shard's commit record


@dataclass(frozen=True, slots=True)
class Result:
    """The outcome of a run."""

    plan: Plan
    """Plan of the store."""
    digest: str | None
    """Digest of the sealed store; None if shards outside `only` are missing."""
    rows: int
    """Rows of the store."""
    rows_run: int
    """Rows of this run."""
    seconds: float
    """Wall time of this run's shards."""


@dataclass(frozen=True, slots=True)
class Execution:
    """The processes and the device of a harvest."""

    workers: int = 1
    """Ray actors; 0 works in this process."""
    device: str = "auto"
    """auto, cpu or cuda."""
    address: str | None = None
    """Address of a running Ray cluster; None starts one on this machine."""

    @property
    def resolved_device(self) -> str:
        """The device, cpu or cuda; a cluster may have the GPU that this machine lacks."""
        elsewhere = self.address is not None and self.device == "cuda"
        return self.device if elsewhere else choose_device(self.device)


def run(
    config: HarvestConfig,
    place: str | Path,
    execution: Execution | None = None,
    only: range | None = None,
    on_progress: OnProgress = lambda done, todo: None,
    notify: Notify = lambda line: None,
) -> Result:
    """Harvest into the store at `place`: begin it, continue it, or make it longer.

    Args:
        only: shards to work on; other runs do the other shards, and the store is sealed when all
            are there.
        on_progress: called about twice a second.
        notify: called with a sentence about the parts of the corpus that are left out.

        Raises:
        SaeHarvestError: any of its kinds; the store stays valid, and the same call continues.
    """
    execution = execution or Execution()
    objects = open_objects(place)
    check_place(objects)
    device = execution.resolved_device
    existing = read_plan(objects) if objects.size(layout.PLAN_KEY) is not None else None
    prepared = prepare(config, existing, device)
    n_shards = prepared.n_shards
    if existing:
        widths = {s.name: s.width for s in existing.sites}
        # Other sites mean another plan, whatever their widths.
        requested = prepared.plan({s: widths.get(s, 1) for s in config.sites})
        check_same(objects, existing, requested)
    if left_out := left_out_sentence(config.corpus.name, prepared.corpus.left_out):
        notify(left_out)
    done = committed_shards(objects) if existing else []
    if existing:
        n_shards = _within_corpus(objects, existing, done, n_shards, prepared.min_contexts)
    open_end = n_shards == ALL_SHARDS and only is None
    span = range(n_shards) if only is None else range(n_shards)[only.start : only.stop]
    todo = missing(done, span)
    n_todo = None if n_shards == ALL_SHARDS else sum(map(len, todo))
    if existing and not todo:
        return _close(objects, existing, n_shards, 0, 0.0)
    inputs = shard_inputs(prepared, objects, existing, todo, n_shards)
    heartbeat: Heartbeat | None = None
    submitted: list[int] = []
    try:
        with (
            HarvestLog(objects.place) as log,
            closing(Ahead(inputs, prepared.corpus.stop)) as ahead,
        ):
            _log_left_out(prepared, log)
            # A corpus with too little text, or no more text, is reported before any work.
            if prepared.may_be_short or (existing and open_end):
                ended = ahead.ended()
                if existing and open_end and ended:
                    return _close(objects, existing, len(done), 0, 0.0)
            with _pool(
                prepared, execution, device, log
            ) as pool:  # the corpus is tokenized while the workers start
                plan = prepared.plan(pool.widths())
                need = bytes_per_row(plan) * (n_todo or 1) * plan.shard_rows
                require_space(objects, need, "ask for fewer --tokens or use another --store")
                ahead.ready(wait=True)  # raises errors of the corpus before anything is created
                plan = create_store(objects, plan, versions())
                log.write(f"plan {plan.hash}: {_amount(n_todo, n_shards)}")
                total = None if n_shards == ALL_SHARDS else n_shards
                with Heartbeat(objects, plan, total, log.write) as heartbeat:
                    work = _Work(objects, plan, pool, n_todo, on_progress, heartbeat, len(done))
                    heartbeat.update(len(done), [], 0, work.todo_rows)
                    submitted = work.submitted
                    work.run(ahead, lambda record: commit_shard(objects, record), again=False)
        prepared.corpus.require_unchanged()
    except InputError:
        # The request cannot be done, and the remedy is another plan: free the place for it, unless
        # another harvest is at work there, say on a machine with other weights.
        alone = heartbeat is not None and not heartbeat.others_at_work()
        if existing is None and alone and not committed_shards(objects):
            discard(objects, plan, submitted)
        raise
    if open_end:
        n_shards = len(committed_shards(objects))
    return _close(objects, plan, n_shards, work.rows, work.seconds)


def _amount(n_todo: int | None, n_shards: int) -> str:
    return "all that the corpus fills" if n_todo is None else f"{n_todo} of {n_shards} shards to do"


def _log_left_out(prepared: Prepared, log: HarvestLog) -> None:
    corpus = prepared.corpus
    if line := left_out_sentence(corpus.name, corpus.left_out, max_names=None):
        log.write(line)


def repair(
    place: str | Path, execution: Execution, on_progress: OnProgress = lambda done, todo: None
) -> tuple[Verification, Verification]:
    """Harvest exactly the damaged shards again; return the reports before and after.

    Raises:
        InputError: model or corpus are gone or have changed; the store was not changed.
        DamagedError: plan.json is damaged, and there is no seal to restore it from.
    """
    objects = open_objects(place)
    restore_plan(objects)
    plan = read_plan(objects)
    before = verify(objects, lambda done, total: None)
    shards = sorted({item.shard for item in before.damage if item.shard is not None})
    if shards:
        device = execution.resolved_device
        prepared = prepare_again(plan, device)
        inputs = shard_inputs(prepared, objects, plan, runs(shards), shards[-1] + 1)
        with (
            HarvestLog(objects.place) as log,
            closing(Ahead(inputs, prepared.corpus.stop)) as ahead,
            _pool(prepared, execution, device, log) as pool,
        ):
            _log_left_out(prepared, log)
            pool.widths()  # if the model cannot load, the repair ends before anything is removed
            sealed = trusted_commits(objects, plan)
            remove_damaged(objects, before.damage)
            log.write(f"repairing shards {', '.join(map(str, shards))}")
            unknown = {item.shard for item in before.damage if item.key.startswith("commits/")}
            digests: dict[int, str] = {}

            def keep(record: dict[str, Any]) -> None:
                mend_commit(objects, plan, record)
                if record["shard"] in unknown:
                    digests[record["shard"]] = digest_of(record)

            _Work(objects, plan, pool, len(shards), on_progress).run(ahead, keep, again=True)
            if wrong := remove_untrusted(objects, plan, digests, sealed):
                log.write(f"repairing all of shards {', '.join(map(str, wrong))}")
                inputs = shard_inputs(prepared, objects, plan, runs(wrong), wrong[-1] + 1)
                with closing(Ahead(inputs)) as ahead:
                    work = _Work(objects, plan, pool, len(wrong), on_progress)
                    work.run(ahead, keep, again=True)
        prepared.corpus.require_unchanged()
    reseal(objects, plan)
    if any(item.key == layout.STATUS_KEY for item in before.damage):
        objects.remove(layout.STATUS_KEY)
    return before, verify(objects, lambda done, total: None)


class _Work:
    """Runs shards through a pool and passes each commit record on as it arrives."""

    def __init__(
        self,
        objects: Objects,
        plan: Plan,
        pool: Pool,
        n_shards: int | None,
        on_progress: OnProgress,
        heartbeat: Heartbeat | None = None,
        already: int = 0,
    ) -> None:
        self._objects, self._plan, self._pool = objects, plan, pool
        self._on_progress, self._heartbeat = on_progress, heartbeat
        self.todo_rows = None if n_shards is None else n_shards * plan.shard_rows
        self._already = already
        self._n_committed = 0
        self.submitted: list[int] = []
        self.rows = 0
        self.seconds = 0.0

    def run(self, shards: Ahead[Shard], keep: Keep, again: bool) -> None:
        """Submit shards, never more than the pool holds, until all have come back.

        Args:
            again: also do shards that are committed already. Otherwise they are skipped: another
                harvest of this store, at the same time, has done them.
        """
        start = time.perf_counter()
        exhausted = False
        while True:
            pool, flying = self._pool, len(self._pool.in_flight())
            # Finished shards do not wait for a slow corpus.
            while not exhausted and flying < pool.capacity and shards.ready(wait=not flying):
                shard = shards.take()
                if shard is None:
                    exhausted = True
                elif again or self._objects.size(layout.commit_key(shard.number)) is None:
                    self.submitted.append(shard.number)
                    pool.submit(self._objects, self._plan, shard)
                    flying += 1
            if not flying:
                break
            for record in self._pool.collect():
                keep(record)
                self._n_committed += 1
                self.rows += record["rows"]
            self._tell()
            self.seconds = time.perf_counter() - start

    def _tell(self) -> None:
        rows = self._pool.rows_done()
        if self.todo_rows is not None:
            rows = min(rows, self.todo_rows)
        self._on_progress(rows, self.todo_rows)
        if self._heartbeat is not None:
            committed = self._already + self._n_committed
            self._heartbeat.update(committed, self._pool.in_flight(), rows, self.todo_rows)


def _pool(
    prepared: Prepared, execution: Execution, device: str, log: HarvestLog
) -> AbstractContextManager[Pool]:
    dtype = prepared.settings.compute_dtype
    sites = prepared.config.sites
    return open_pool(
        execution.workers, prepared.model, sites, dtype, device, execution.address, log.write
    )


def _within_corpus(
    objects: Objects, plan: Plan, done: list[int], n_shards: int, min_contexts: int
) -> int:
    """Return fewer shards if the store holds the corpus' last shard and enough contexts.

    If it has too few contexts, return one shard more than there are: reading the corpus then
    reports its size.
    """
    if not done or done != list(range(len(done))) or len(done) > n_shards:
        return n_shards
    contexts = read_commit(objects, plan, done[-1])["contexts"]
    if contexts == plan.contexts_per_shard:
        return n_shards
    n_contexts = done[-1] * plan.contexts_per_shard + contexts
    return len(done) if n_contexts >= min_contexts else len(done) + 1


def _close(objects: Objects, plan: Plan, n_shards: int, rows_run: int, seconds: float) -> Result:
    """Seal the requested shards if all are committed."""
    done = [shard for shard in committed_shards(objects) if shard < n_shards]
    is_whole = done == list(range(len(done))) and (
        len(done) == n_shards
        or bool(done and read_commit(objects, plan, done[-1])["contexts"] < plan.contexts_per_shard)
    )
    if not is_whole:
        return Result(plan, None, len(done) * plan.shard_rows, rows_run, seconds)
    record = seal(objects, plan, len(done))
    return Result(plan, record["digest"], record["rows"], rows_run, seconds)


def bytes_per_row(plan: Plan) -> int:
    """Return the bytes of one row over all sites, side tables included (an upper estimate)."""
    return sum(s.width * plan.itemsize for s in plan.sites) + SMALL_BYTES_PER_ROW
