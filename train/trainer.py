"""The training loop: batches in, checkpoints and metrics out, and at the end a dictionary.

    OUT/run.json            configuration and the store it reads; written first
    OUT/metrics.jsonl       one line per step
    OUT/checkpoints/000200  everything needed to continue, the newest two
    OUT/sae.safetensors, OUT/config.json, OUT/evaluation.json    at the end

The same call, made again, continues from the newest checkpoint and ends with the same bits.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from store.device import choose_device
from store.errors import RunError, UnfinishedError
from store.loader import ShuffledLoader
from store.reader import ActivationStore
from train.checkpoint import load_newest, save_checkpoint
from train.config import TrainConfig
from train.evaluate import evaluate
from train.files import read_json, write_json
from train.initial import initial_sae, prepare, sample_rows
from train.interrupt import Interruption
from train.metrics import MetricsFile
from train.optimizer import Optimizer
from train.sae import CONFIG_FILE, SAE
from train.step import StepResult, Workspace, train_step

RUN_FILE, METRICS_FILE, EVALUATION_FILE = "run.json", "metrics.jsonl", "evaluation.json"
FORMAT = 1

Report = Callable[[str, int, int, str], None]


@dataclass(frozen=True)
class RunResult:
    """steps done; whether the run was finished; the last metrics; the evaluation if finished."""

    steps: int
    finished: bool
    metrics: dict[str, Any]
    evaluation: dict[str, Any] | None


def silent(phase: str, done: int, total: int, rate: str) -> None:
    """The report of a run that nobody watches."""


def open_store(place: str | Path, out: Path) -> ActivationStore:
    """The store, as it was when the run in `out` began if there is one and it has grown since."""
    store = ActivationStore.open(place)
    if (out / RUN_FILE).exists():
        begun = read_json(out / RUN_FILE, "The run", "choose another --out")["store_digest"]
        if begun != store.digest:
            with contextlib.suppress(UnfinishedError):  # another store: `claim` says so
                return ActivationStore.open(place, begun)
    return store


def describe_run(config: TrainConfig, store: ActivationStore, site: str) -> dict[str, Any]:
    """The content of run.json: what decides the result, apart from the device."""
    return {
        "format": FORMAT,
        "site": site,
        "store_digest": store.digest,
        "model": store.plan["model"],
        "config": config.model_dump(mode="json"),
    }


def claim(out: Path, run: dict[str, Any]) -> None:
    """Makes `out` this run's folder, or checks that it is.

    Raises:
        RunError: another run's folder, naming the fields that differ; or no run's folder.
    """
    path = out / RUN_FILE
    if not path.exists():
        # a temporary file is all that a run killed at its very start leaves
        if out.is_dir() and any(not file.name.endswith(".tmp") for file in out.iterdir()):
            raise RunError(f"{out} holds other files and no {RUN_FILE}; choose another --out.")
        out.mkdir(parents=True, exist_ok=True)
        write_json(path, run)
        return
    found = read_json(path, "The run", "choose another --out")
    old, new = _flat(found), _flat(run)
    differing = [
        f"{name} (there {old.get(name)}, here {new.get(name)})"
        for name in sorted(old.keys() | new.keys())
        if old.get(name) != new.get(name)
    ]
    if differing:
        raise RunError(
            f"{out} holds a run that differs in {', '.join(differing)}; give the same options to "
            "continue it, or choose another --out."
        )


def _flat(run: Any, prefix: str = "") -> dict[str, Any]:
    """Nested dictionaries as one, keys joined by dots, without the leading `config.`."""
    if not isinstance(run, dict):
        return {prefix.removesuffix(".").removeprefix("config."): run}
    items: dict[str, Any] = {}
    for key, value in run.items():
        items |= _flat(value, f"{prefix}{key}.")
    return items


class _Run:
    """What changes from step to step."""

    def __init__(
        self,
        config: TrainConfig,
        loader: ShuffledLoader,
        site: str,
        out: Path,
        device: torch.device,
        model: dict[str, Any],
    ) -> None:
        self.config, self.out, self.loader = config, out, loader
        saved = load_newest(out, str(device))
        if saved is None:
            beginning = loader.state()
            start = prepare(sample_rows(loader), config.normalization)
            loader.load_state(beginning)
            self.sae = initial_sae(config, site, start, device, model)
            self.total_variance = start.total_variance
        else:
            self.sae = saved.sae
            self.total_variance = saved.state["total_variance"]
        self.optimizer = Optimizer(self.sae, config)
        # tokens seen when each latent last fired
        self.last_fired = torch.zeros(config.n_latents, dtype=torch.int64, device=device)
        if saved is not None:
            self.optimizer.step_number = saved.state["step"]
            for name, tensor in self._tensors().items():
                tensor.copy_(saved.tensors[name])
            self.loader.load_state(saved.state["loader"])
        self.workspace = Workspace(self.sae, config.batch_rows)

    @property
    def step(self) -> int:
        return self.optimizer.step_number

    @property
    def tokens(self) -> int:
        return self.step * self.config.batch_rows

    def _tensors(self) -> dict[str, torch.Tensor]:
        return {**self.optimizer.tensors(), "last_fired": self.last_fired}

    def advance(self) -> dict[str, Any]:
        """One step; its metrics."""
        config = self.config
        x = self.loader.next_batch().x
        dead = self.tokens - self.last_fired >= config.dead_after_tokens
        result: StepResult = train_step(
            self.sae,
            x,
            self.total_variance,
            dead,
            config.auxiliary_k(self.sae.config.d_in),
            config.auxk_alpha,
            self.workspace,
        )
        if not (math.isfinite(result.loss + result.auxk) and math.isfinite(result.grad_norm)):
            raise RunError(
                f"Training diverged at step {self.step + 1} (loss {result.loss}, gradient norm "
                f"{result.grad_norm}); use a lower --lr than {config.learning_rate:g} and "
                "another --out."
            )
        self.optimizer.step(self.sae, self.workspace.gradients, result.grad_norm)
        self.last_fired[result.fired] = self.tokens
        return {
            "step": self.step,
            "tokens": self.tokens,
            "loss": result.loss,
            "fvu": result.fvu,
            "auxk": result.auxk,
            "dead_share": float(dead.double().mean()),
            "dead_after_tokens": config.dead_after_tokens,
            "l0": result.l0,
            "grad_norm": result.grad_norm,
            "lr": config.learning_rate,
        }

    def save(self) -> None:
        state = {"total_variance": self.total_variance, "loader": self.loader.state()}
        save_checkpoint(self.out, self.step, self.sae, self._tensors(), state)


def train(
    config: TrainConfig,
    place: str | Path,
    out: str | Path,
    site: str | None = None,
    device: str = "auto",
    report: Report = silent,
) -> RunResult:
    """Trains a dictionary, or continues to.

    Args:
        config: the run.
        place: of a sealed activation store. A run that is continued reads the store as it was
            when the run began, if it has grown since.
        out: the run's folder.
        site: which activations; None for the store's only site.
        device: cpu, cuda or auto.
        report: called with phase, done, total and a rate such as "5,120 tokens/s".

    Raises:
        SaeHarvestError: store, site, device or folder cannot be used; training diverged.
    """
    out = Path(out)
    chosen = torch.device(choose_device(device))
    store = open_store(place, out)
    site = store.site(site)
    # before the folder is claimed: it refuses a store too small for a batch
    loader = ShuffledLoader(store, site, config.batch_rows, seed=config.seed, rule=config.rule)
    try:
        claim(out, describe_run(config, store, site))
        report("preparing", 0, config.steps, "")
        run = _Run(config, loader, site, out, chosen, store.plan["model"])
        return _train(run, store, report)
    except (OSError, SafetensorError) as error:
        raise RunError(
            f"Cannot read or write in {out} ({error}); see to the disk and its permissions, then "
            "run the same command again to continue."
        ) from error
    finally:
        loader.close()


def _train(run: _Run, store: ActivationStore, report: Report) -> RunResult:
    """Steps until the run is done or interrupted; checkpoints, metrics, the result."""
    config, out = run.config, run.out
    metrics: dict[str, Any] = {}
    saved_step = run.step
    with Interruption() as interruption, MetricsFile(out / METRICS_FILE, run.step) as log:
        while run.step < config.steps and not interruption.asked:
            started = time.perf_counter()
            metrics = run.advance()
            rate = config.batch_rows / (time.perf_counter() - started)
            log.write({**metrics, "tokens_per_second": round(rate)})
            report("training", run.step, config.steps, f"{rate:,.0f} tokens/s")
            if run.step % config.checkpoint_every == 0:
                run.save()
                saved_step = run.step
        if run.step != saved_step:
            run.save()
    if run.step < config.steps:
        return RunResult(run.step, False, metrics, None)
    return RunResult(run.step, True, metrics, _finish(run, store, report))


def _finish(run: _Run, store: ActivationStore, report: Report) -> dict[str, Any]:
    """Writes the averaged dictionary and its evaluation, unless they are there already."""
    path = run.out / EVALUATION_FILE
    sae = run.optimizer.averaged(run.sae)
    if path.exists() and (run.out / CONFIG_FILE).exists():
        found: dict[str, Any] = read_json(path, "The run", "delete that file")
        if found.get("sae_digest") == sae.digest == SAE.load(run.out).digest:
            return found
    sae.save(run.out)
    result = evaluate(
        sae,
        store,
        run.config.rule,
        run.config.eval_rows,
        lambda done, total: report("evaluating", done, total, ""),
    )
    write_json(path, result)
    return result
