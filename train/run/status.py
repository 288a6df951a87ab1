"""The progress of a run or a sweep, read from its folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sae_harvest.common.errors import InputError
from sae_harvest.common.locks import LOCK_FILE, is_held
from sae_harvest.train.config import TrainConfig
from sae_harvest.train.run.checkpoint import saved_steps
from sae_harvest.train.run.files import read_record
from sae_harvest.train.run.folder import (
    EVALUATION_FILE,
    METRICS_FILE,
    RUN_FILE,
    config_of,
    failure_of,
)
from sae_harvest.train.run.metrics import last_metrics
from sae_harvest.train.run.records import Evaluation, Run, Sweep
from sae_harvest.train.sweeps.sweep import SWEEP_FILE

REMEDY = "run it again with another --out"


@dataclass(frozen=True)
class RunStatus:
    """The progress of one run."""

    name: str
    """Name of the run."""
    step: int
    """Step of the last line of metrics; 0 without one."""
    steps: int
    """Steps of the whole run."""
    saved: int | None
    """Step of the newest checkpoint; None without one."""
    metrics: dict[str, Any]
    """The last line of metrics."""
    evaluation: dict[str, Any] | None
    """Evaluation of a finished run."""
    failure: str | None
    """Message of a failed run."""
    running: bool
    """Whether a process holds the folder."""

    @property
    def state(self) -> str:
        """The state: finished, failed, running or unfinished."""
        if self.evaluation is not None:
            return "finished"
        if self.failure is not None:
            return "failed"
        return "running" if self.running else "unfinished"


def read_status(out: Path) -> list[RunStatus]:
    """Return the run in a folder, or the members of the sweep there.

    Raises:
        InputError: there is neither.
        RunError: a file is damaged.
    """
    if (out / SWEEP_FILE).exists():
        path = out / SWEEP_FILE
        record = read_record(path, Sweep, "The sweep", REMEDY)
        return [
            _read(out / name, name, config_of(path, {"config": config}, REMEDY))
            for name, config in record["members"].items()
        ]
    path = out / RUN_FILE
    if not path.exists():
        raise InputError(
            f"{out} holds no run (no {RUN_FILE} or {SWEEP_FILE}); give the --out folder of "
            "`train-sae run` or `train-sae sweep`."
        )
    record = read_record(path, Run, "The run", REMEDY)
    return [_read(out, str(out), config_of(path, record, REMEDY))]


def _read(folder: Path, name: str, config: TrainConfig) -> RunStatus:
    metrics, saved, evaluation = last_metrics(folder / METRICS_FILE), saved_steps(folder), None
    if (folder / EVALUATION_FILE).exists():
        evaluation = read_record(
            folder / EVALUATION_FILE, Evaluation, "The run", "delete that file"
        )
    return RunStatus(
        name=name,
        step=metrics.get("step", 0),
        steps=config.steps,
        saved=saved[-1] if saved else None,
        metrics=metrics,
        evaluation=evaluation,
        failure=failure_of(folder),
        running=is_held(folder / LOCK_FILE),
    )
