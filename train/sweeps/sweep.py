"""Many dictionaries trained on one stream of batches.

    OUT/sweep.json          the members, and which of them are trained together
    OUT/<member>/           the folder of a run, with the same bits as from `train-sae run`

A member that diverges is recorded in its folder as failed, and the others continue. Batches are
read once for all members of a pass. Members that do not fit into memory together are trained in
several passes. This is decided from an estimate of each member's memory.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sae_harvest.common.device import choose_device
from sae_harvest.common.errors import RunError
from sae_harvest.common.units import size_text
from sae_harvest.store.reader import ActivationStore
from sae_harvest.train.config import TrainConfig
from sae_harvest.train.planning.count import available_bytes, memory_bytes
from sae_harvest.train.run.checkpoint import saved_steps
from sae_harvest.train.run.faults import explained
from sae_harvest.train.run.files import read_record, write_json
from sae_harvest.train.run.folder import (
    FORMAT,
    claim,
    describe_run,
    failure_of,
    finished_evaluation,
    open_store,
)
from sae_harvest.train.run.records import Sweep as SweepRecord
from sae_harvest.train.run.run_state import BatchStream, TrainingRun
from sae_harvest.train.run.trainer import OnPhase, evaluate_into, run_pass, silent
from sae_harvest.train.sae.sharded_sae import Dictionary

SWEEP_FILE, PASSES = "sweep.json", "passes"
USABLE = 0.9  # share of the free memory; other programs need some, too

Announce = Callable[[str], None]


@dataclass(frozen=True)
class MemberResult:
    """The result of one member; both fields are None if it has not ended."""

    evaluation: dict[str, Any] | None
    """Evaluation of a finished member."""
    failure: str | None
    """Message of a failed member."""


@dataclass(frozen=True)
class SweepResult:
    """The result of a sweep."""

    members: dict[str, MemberResult]
    """Results by name, in the order of the file."""
    signal: int | None
    """Number of the signal that stopped the sweep."""

    @property
    def finished(self) -> bool:
        """Whether all runs of the sweep are finished."""
        return self.signal is None

    @property
    def failed(self) -> list[str]:
        return [name for name, member in self.members.items() if member.failure is not None]


def sweep(
    members: Mapping[str, TrainConfig],
    place: str | Path,
    out: str | Path,
    site: str | None = None,
    device: str = "auto",
    report: OnPhase = silent,
    announce: Announce = lambda text: None,
) -> SweepResult:
    """Train members on one stream, or continue their training.

    Args:
        members: configurations by name, with the same stream of batches
            (`train.sweeps.sweepfile`).
        place: place of a sealed activation store.
        out: the sweep's folder.
        site: site to train on; None for the store's only site.
        device: cpu, cuda or auto.
        report: called with phase, done, total and a rate.
        announce: called with a sentence, before each pass.

    Raises:
        SaeHarvestError: store, site, device or folder cannot be used; a member does not fit into
            memory.
    """
    out = Path(out)
    chosen = torch.device(choose_device(device))
    store = open_store(place, out, SWEEP_FILE)
    site = store.site(site)
    stream = BatchStream(next(iter(members.values())), store, site, chosen)
    try:
        with explained(out), ExitStack() as stack:
            stack.enter_context(claim(out, describe_sweep(members, store, site), SWEEP_FILE))
            for name, config in members.items():
                stack.enter_context(claim(out / name, describe_run(config, store, site)))
            report("preparing", 0, 0, "")
            signal = _train(members, out, stream, report, announce)
            return SweepResult({name: read_result(out / name) for name in members}, signal)
    finally:
        stream.close()


def describe_sweep(
    members: Mapping[str, TrainConfig], store: ActivationStore, site: str
) -> dict[str, Any]:
    """Return the inputs that decide the results of a sweep, as kept in sweep.json."""
    return {
        "format": FORMAT,
        "site": site,
        "store_digest": store.digest,
        "members": {name: config.model_dump(mode="json") for name, config in members.items()},
    }


def passes(
    groups: Sequence[Sequence[str]], needs: Mapping[str, int], available: int
) -> list[list[str]]:
    """Split groups of members into groups that fit into memory together.

    First-fit by decreasing need, which takes at most a quarter more passes than there must be.

    Args:
        groups: members that may be trained together.
        needs: bytes of each member.
        available: bytes of usable memory.

    Raises:
        RunError: one member alone does not fit.
    """
    too_large = [name for group in groups for name in group if needs[name] > available]
    if too_large:
        worst = max(too_large, key=lambda name: needs[name])
        raise RunError(
            f"{len(too_large)} of the members do not fit into memory: {worst} takes about "
            f"{size_text(needs[worst])}, {size_text(available)} can be used; use fewer "
            "n_latents or batch_rows, or a larger machine."
        )
    found: list[list[str]] = []
    for group in groups:
        bins: list[list[str]] = []
        for name in sorted(group, key=lambda name: -needs[name]):
            for members in bins:
                if sum(needs[other] for other in members) + needs[name] <= available:
                    members.append(name)
                    break
            else:
                bins.append([name])
        order = list(group)
        found += [sorted(members, key=order.index) for members in bins]
    return found


def common_step(saved: Sequence[Sequence[int]]) -> int:
    """Return the newest step of which all members have a checkpoint; at least 0."""
    return max(set[int].intersection(*({0, *steps} for steps in saved)), default=0)


def read_result(folder: Path) -> MemberResult:
    """Return the result of the run in a folder, or None if it has not ended."""
    failure = failure_of(folder)
    if failure is not None:
        return MemberResult(None, failure)
    return MemberResult(finished_evaluation(folder), None)


def _train(
    members: Mapping[str, TrainConfig],
    out: Path,
    stream: BatchStream,
    report: OnPhase,
    announce: Announce,
) -> int | None:
    """Run pass after pass, then the evaluations. Return the signal that stopped the sweep."""
    record = read_record(out / SWEEP_FILE, SweepRecord, "The sweep", "choose another --out")
    results = {name: read_result(out / name) for name in members}
    left = [name for name, result in results.items() if result == MemberResult(None, None)]
    groups = [[n for n in group if n in left] for group in record.get(PASSES) or [left]]
    groups = [group for group in groups if group]
    if not groups:
        return None
    stream.loader.next_batch()  # so that what the loader keeps in memory counts
    usable = int(USABLE * available_bytes(stream.device))
    stream.seek(None)
    d_in = stream.store.width(stream.site)
    target = next(iter(members.values())).target_site
    d_out = None if target is None else stream.store.width(target)
    needs = {name: memory_bytes(config, d_in, d_out) for name, config in members.items()}
    groups = passes(groups, needs, usable)
    write_json(out / SWEEP_FILE, {**record, PASSES: groups})
    for number, group in enumerate(groups, 1):
        total = sum(needs[name] for name in group)
        announce(
            f"Pass {number} of {len(groups)}: {len(group)} SAEs, about {size_text(total)} of "
            f"{size_text(usable)} of memory: {', '.join(group)}"
        )
        signal = _pass({name: members[name] for name in group}, out, stream, report)
        if signal is not None:
            return signal
    return None


def _pass(
    configs: Mapping[str, TrainConfig], out: Path, stream: BatchStream, report: OnPhase
) -> int | None:
    """Train, write and evaluate members that fit into memory together. Return the signal."""
    training = [TrainingRun(config, out / name, stream) for name, config in configs.items()]
    saved = {member.out: saved_steps(member.out) for member in training}
    done = [m for m in training if m.config.steps in saved[m.out]]
    going = [m for m in training if m not in done]
    for member in done:
        member.begin(member.config.steps)
    if going:
        step = common_step([saved[member.out] for member in going])
        positions = [member.begin(step) for member in going]
        stream.seek(positions[0])
    signal = run_pass(training, stream, report)
    dictionaries: list[tuple[Path, Dictionary]] = []
    for member in training:
        if member.failure is None and member.step == member.config.steps:
            dictionaries.append((member.out, member.result()))
        member.release()
    if signal is None and dictionaries:
        evaluate_into(dictionaries, stream.store, training[0].config, report)
    return signal
