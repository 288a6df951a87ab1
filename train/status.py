"""How far a run or a sweep is, read from its folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from store.errors import InputError
from train.checkpoint import saved_steps
from train.config import TrainConfig
from train.files import read_json
from train.folder import EVALUATION_FILE, FAILED_FILE, METRICS_FILE, RUN_FILE, is_locked
from train.metrics import last_metrics
from train.sweep import SWEEP_FILE


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
        record = read_json(out / SWEEP_FILE, "The sweep", "run it again with another --out")
        return [_read(out / name, name, TrainConfig(**c)) for name, c in record["members"].items()]
    if not (out / RUN_FILE).exists():
        raise InputError(
            f"{out} holds no run (no {RUN_FILE} or {SWEEP_FILE}); give the --out folder of "
            "`train-sae run` or `train-sae sweep`."
        )
    record = read_json(out / RUN_FILE, "The run", "run it again with another --out")
    return [_read(out, str(out), TrainConfig(**record["config"]))]


def _read(folder: Path, name: str, config: TrainConfig) -> RunStatus:
    def content(file: str) -> Any:
        path = folder / file
        return read_json(path, "The run", "delete that file") if path.exists() else None

    metrics, saved, failed = last_metrics(folder / METRICS_FILE), saved_steps(folder), None
    if (found := content(FAILED_FILE)) is not None:
        failed = found["sentence"]
    return RunStatus(
        name=name,
        step=metrics.get("step", 0),
        steps=config.steps,
        saved=saved[-1] if saved else None,
        metrics=metrics,
        evaluation=content(EVALUATION_FILE),
        failure=failed,
        running=is_locked(folder),
    )
