"""How far a run or a sweep is, read from its folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from store.errors import InputError, RunError
from store.parsing import safe_name
from train.checkpoint import saved_steps
from train.config import TrainConfig
from train.files import read_json
from train.folder import (
    EVALUATION_FILE,
    METRICS_FILE,
    RUN_FILE,
    config_of,
    failure_of,
    is_locked,
)
from train.metrics import last_metrics
from train.sweep import SWEEP_FILE

REMEDY = "run it again with another --out"


@dataclass(frozen=True)
class RunStatus:
    """One run.

    step: of the last line of metrics; saved: step of the newest checkpoint, None without;
    metrics: the last ones; evaluation: of a finished run; failure: the sentence of a failed one.
    """

    name: str
    step: int
    steps: int
    saved: int | None
    metrics: dict[str, Any]
    evaluation: dict[str, Any] | None
    failure: str | None
    running: bool

    @property
    def state(self) -> str:
        """finished, failed, running or unfinished."""
        if self.evaluation is not None:
            return "finished"
        if self.failure is not None:
            return "failed"
        return "running" if self.running else "unfinished"


def read_status(out: Path) -> list[RunStatus]:
    """The run in a folder, or the members of the sweep there.

    Raises:
        InputError: there is neither. RunError: a file there is damaged.
    """
    if (out / SWEEP_FILE).exists():
        record = read_json(out / SWEEP_FILE, "The sweep", REMEDY)
        members = record.get("members") if isinstance(record, dict) else None
        if not isinstance(members, dict):
            raise RunError(f"{out / SWEEP_FILE} names no members of a sweep; {REMEDY}.")
        return [_member(out, name, config) for name, config in members.items()]
    if not (out / RUN_FILE).exists():
        raise InputError(
            f"{out} holds no run (no {RUN_FILE} or {SWEEP_FILE}); give the --out folder of "
            "`train-sae run` or `train-sae sweep`."
        )
    record = read_json(out / RUN_FILE, "The run", REMEDY)
    return [_read(out, str(out), config_of(out / RUN_FILE, record, REMEDY))]


def _member(out: Path, name: str, config: Any) -> RunStatus:
    """A member of the sweep in `out`, whose record has its name and configuration."""
    record = out / SWEEP_FILE
    try:
        folder = out / safe_name(name)
    except ValueError as error:
        raise RunError(f"{record} is damaged ({error}); {REMEDY}.") from None
    return _read(folder, name, config_of(record, {"config": config}, REMEDY))


def _read(folder: Path, name: str, config: TrainConfig) -> RunStatus:
    metrics, saved = last_metrics(folder / METRICS_FILE), saved_steps(folder)
    found = folder / EVALUATION_FILE
    evaluation = read_json(found, "The run", "delete that file") if found.exists() else None
    return RunStatus(
        name=name,
        step=metrics.get("step", 0),
        steps=config.steps,
        saved=saved[-1] if saved else None,
        metrics=metrics,
        evaluation=evaluation,
        failure=failure_of(folder),
        running=is_locked(folder),
    )
