"""The training loop: batches in, checkpoints and metrics out, and at the end a dictionary.

A pass reads one stream of batches and trains any number of members on it, each in its own folder
(`train.run.folder` lists the files). A run is a pass with one member; a sweep has more. Repeating
the same call continues from the newest checkpoint and ends with the same bits.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sae_harvest.common.device import choose_device
from sae_harvest.store.reader import ActivationStore
from sae_harvest.train.config import TrainConfig
from sae_harvest.train.evaluate import evaluate_all
from sae_harvest.train.parallel.process_group import ProcessGroup
from sae_harvest.train.run.checkpoint import saved_steps
from sae_harvest.train.run.faults import explained
from sae_harvest.train.run.files import write_json
from sae_harvest.train.run.folder import (
    EVALUATION_FILE,
    claim,
    describe_run,
    finished_evaluation,
    open_store,
)
from sae_harvest.train.run.interrupt import Interruption
from sae_harvest.train.run.run_state import ALONE, BatchStream, TrainingRun
from sae_harvest.train.sae.sharded_sae import Dictionary

OnPhase = Callable[[str, int, int, str], None]


@dataclass(frozen=True)
class RunResult:
    """The result of a run."""

    steps: int
    """Steps done."""
    finished: bool
    """Whether all steps are done."""
    metrics: dict[str, Any]
    """Metrics of the last step."""
    evaluation: dict[str, Any] | None
    """Evaluation of a finished run."""
    signal: int | None = None
    """Number of the signal that stopped the run, such as SIGTERM."""


def silent(phase: str, done: int, total: int, rate: str) -> None:
    """Report nothing."""


def run_pass(
    members: Sequence[TrainingRun],
    stream: BatchStream,
    report: OnPhase,
    asked: Callable[[], bool] = lambda: False,
) -> int | None:
    """Train members that begin at the same step, until all are done or failed.

    Args:
        asked: returns whether to stop before the next step; signals stop it as well.

    Returns:
        The number of the signal that stopped the pass; None if it came to its end.
    """
    steps = max(member.config.steps for member in members)
    with ExitStack() as stack:
        interruption = stack.enter_context(Interruption())
        for member in members:
            stack.enter_context(member.logging())
        while live := [member for member in members if member.is_live]:
            if stream.group.anywhere(interruption.asked or asked()):
                break
            started = time.perf_counter()
            batch = stream.loader.next_batch()
            for member in live:
                member.advance(batch)
            rate = stream.batch_rows / (time.perf_counter() - started)
            for member in live:
                member.record(rate)
                if member.step % member.config.checkpoint_every == 0 or not member.is_live:
                    member.save()
            report("training", max(m.step for m in members), steps, f"{rate:,.0f} tokens/s")
        for member in members:
            member.save()
        return interruption.signal


def train(
    config: TrainConfig,
    place: str | Path,
    out: str | Path,
    site: str | None = None,
    device: str = "auto",
    report: OnPhase = silent,
    group: ProcessGroup = ALONE,
    asked: Callable[[], bool] = lambda: False,
) -> RunResult:
    """Train a dictionary, or continue its training.

    Args:
        config: the run.
        place: place of a sealed store. A continued run reads the store as it was when the run
            began, even if it has grown since.
        out: the run's folder.
        site: site to train on; None for the store's only site.
        device: cpu, cuda or auto.
        report: called with phase, done, total and a rate such as "5,120 tokens/s".
        group: processes that train this dictionary together; each calls this.
        asked: returns whether to stop before the next step; signals stop it as well.

    Raises:
        SaeHarvestError: store, site, device or folder cannot be used; training diverged.
    """
    out = Path(out)
    chosen = torch.device(choose_device(device))
    store = open_store(place, out)
    site = store.site(site)
    # before the folder is claimed: it refuses a store too small for a batch
    stream = BatchStream(config, store, site, chosen, group)
    try:
        with explained(out), ExitStack() as stack:
            claimed = claim(out, describe_run(config, store, site))
            group.together(lambda: stack.enter_context(claimed) if group.rank == 0 else None)
            group.check_shared(out)
            report("preparing", 0, config.steps, "")
            member = TrainingRun(config, out, stream)
            saved = saved_steps(out)
            stream.seek(member.begin(group.from_first(saved[-1] if saved else 0)))
            signal = run_pass([member], stream, report, asked)
            if member.failure is not None:
                raise member.failure
            if member.step < config.steps:
                return RunResult(member.step, False, member.metrics, None, signal)
            sae = member.result()
            found = finished_evaluation(out, sae.digest) if group.rank == 0 else None
            if not group.anywhere(found is not None):
                if group.rank == 0:
                    [found] = evaluate_into([(out, sae)], store, config, report)
                elif group.latent_parts > 1:  # the first one needs our latents
                    evaluate_all([sae], store, config.rule, config.eval_rows)
            return RunResult(member.step, True, member.metrics, found)
    finally:
        stream.close()


def evaluate_into(
    members: Sequence[tuple[Path, Dictionary]],
    store: ActivationStore,
    config: TrainConfig,
    report: OnPhase,
) -> list[dict[str, Any]]:
    """Evaluate dictionaries on held-out rows and write the results into their folders.

    Args:
        members: folders and dictionaries; they read the same rows.
        config: decides the rows and their number.
    """
    results = evaluate_all(
        [sae for _, sae in members],
        store,
        config.rule,
        config.eval_rows,
        lambda done, total: report("evaluating", done, total, ""),
    )
    for (out, _), result in zip(members, results, strict=True):
        write_json(out / EVALUATION_FILE, result)
    return results
