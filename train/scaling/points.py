"""Reading a sweep: one point per finished run, with its training curve.

A sweep is a folder of run folders, each with run.json, evaluation.json and metrics.jsonl.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sae_harvest.common.errors import InputError, RunError
from sae_harvest.common.parsing import first_line, parse_json
from sae_harvest.train.config import TrainConfig
from sae_harvest.train.planning.count import step_flops
from sae_harvest.train.run.files import read_record
from sae_harvest.train.run.folder import (
    EVALUATION_FILE,
    FAILED_FILE,
    METRICS_FILE,
    RUN_FILE,
    config_of,
)
from sae_harvest.train.run.records import Evaluation, Line, Run
from sae_harvest.train.sae.sae import SAE
from sae_harvest.train.scaling.laws import Array

REMEDY = "train it again or move it away"
# settings that may differ between the runs of one law
FREE = {"n_latents", "k", "seed", "order_seed", "lr", "checkpoint_every", "matryoshka"}
NAMED = 5  # folders named in an error


@dataclass(frozen=True)
class RunPoint:
    """One finished run."""

    name: str
    """Name of its folder."""
    n_latents: int
    """Number of latents."""
    k: int
    """Active latents per row."""
    seed: int
    """Seed of the run."""
    lr: float
    """Learning rate."""
    tokens: int
    """Rows trained on."""
    flops: float
    """Operations of the whole training, without AuxK."""
    fvu: float
    """Held-out FVU without outlier rows."""
    l0: float
    """Active latents per held-out row."""
    curve_tokens: Array
    """Rows seen after each step, [steps]."""
    curve_fvu: Array
    """FVU of each training batch before its step, [steps]."""

    @property
    def flops_per_token(self) -> float:
        return self.flops / self.tokens


def read_sweep(folder: Path) -> list[RunPoint]:
    """Return the runs of a sweep, by n_latents, k and seed.

    Raises:
        InputError: there are no runs, failed or unfinished runs, or runs that one law cannot
            describe.
        RunError: a run's files are damaged.
    """
    places = sorted(path.parent for path in folder.glob(f"*/{RUN_FILE}"))
    if not places:
        raise InputError(
            f"{folder} holds no runs (no */{RUN_FILE}); give the --out folder of `train-sae sweep`."
        )
    failed = [place.name for place in places if (place / FAILED_FILE).exists()]
    if failed:
        raise InputError(
            f"{len(failed)} of the {len(places)} runs in {folder} failed ({_some(failed)}; see "
            f"their {FAILED_FILE}); move them away, or train them with other settings."
        )
    unfinished = [place.name for place in places if not (place / EVALUATION_FILE).exists()]
    if unfinished:
        raise InputError(
            f"{len(unfinished)} of the {len(places)} runs in {folder} are unfinished "
            f"({_some(unfinished)}); run the same `train-sae sweep` again to finish them."
        )
    runs = {place: read_record(place / RUN_FILE, Run, f"Run {place}", REMEDY) for place in places}
    configs = {place: config_of(place / RUN_FILE, run, REMEDY) for place, run in runs.items()}
    _check_alike(runs, configs)
    points = [_point(place, configs[place]) for place in places]
    return sorted(points, key=lambda p: (p.n_latents, p.k, p.seed, p.lr))


def _some(names: list[str]) -> str:
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more


def _check_alike(runs: dict[Path, Any], configs: dict[Path, TrainConfig]) -> None:
    """Raise `InputError` unless all runs have the same store, site and settings (except FREE)."""
    fields = {
        "site": [run.get("site") for run in runs.values()],
        "store": [run.get("store_digest") for run in runs.values()],
        **{
            name: [getattr(config, name) for config in configs.values()]
            for name in TrainConfig.model_fields
            if name not in FREE
        },
    }
    names = [place.name for place in runs]
    for field, values in fields.items():
        for name, value in zip(names, values, strict=True):
            if value != values[0]:
                raise InputError(
                    f"Runs {names[0]} and {name} differ in {field} ({values[0]} and {value}), so "
                    "no one law describes them; keep runs to compare in one folder and move the "
                    "others away."
                )
    without = [place.name for place, config in configs.items() if config.k is None]
    if without:
        raise InputError(
            f"Scaling laws need a fixed number of active latents, and {_some(without)} has no k "
            f"(activation {next(iter(configs.values())).activation}); sweep topk, batchtopk, "
            "jumprelu or relu_kl."
        )


def _point(place: Path, config: TrainConfig) -> RunPoint:
    evaluation = read_record(place / EVALUATION_FILE, Evaluation, f"Run {place}", REMEDY)
    shape = SAE.read_config(place)
    fvu, l0 = (evaluation["without_outliers"][name] for name in ("fvu", "l0"))
    if fvu is None or fvu <= 0 or l0 is None:
        raise RunError(f"{place} has no held-out FVU in {EVALUATION_FILE}; {REMEDY}.")
    tokens, curve = _curve(place)
    assert config.k is not None  # _check_alike
    return RunPoint(
        name=place.name,
        n_latents=config.n_latents,
        k=config.k,
        seed=config.seed,
        lr=config.learning_rate,
        tokens=config.steps * config.batch_rows,
        flops=config.steps * step_flops(config, shape.d_in, shape.d_out),
        fvu=fvu,
        l0=l0,
        curve_tokens=tokens,
        curve_fvu=curve,
    )


def _curve(place: Path) -> tuple[Array, Array]:
    """Return the rows seen and FVU of each step."""
    path = place / METRICS_FILE
    try:
        with path.open(encoding="utf-8") as lines:
            found = [Line.model_validate(parse_json(line)) for line in lines]
        pairs = [(line.tokens, line.fvu) for line in found]
        table = np.array(pairs, float).reshape(-1, 2)  # None becomes NaN
    except (OSError, ValueError) as error:
        raise RunError(
            f"{path} cannot be read as metrics of a run ({first_line(error)}); {REMEDY}."
        ) from None
    if not len(table) or not np.isfinite(table).all():
        raise RunError(f"{path} lacks the FVU of a step; {REMEDY}.")
    return table[:, 0], table[:, 1]
