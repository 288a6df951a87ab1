"""One run on many processes, started and watched by Ray Train, on this machine or on a cluster.

The command that the user typed starts the workers, shows how far they are, and reports the one
sentence that matters when they end. It is in touch with them through the run's folder, which all
machines have to share:

    OUT/.driver-<number>.tmp   made before the workers start; each of them has to see it
    OUT/.stop-<number>.tmp     made when the command is asked to stop
    OUT/metrics.jsonl          how far the run is
    OUT/.ray-<number>.tmp      what Ray Train writes for itself; removed at the end
"""

from __future__ import annotations

import contextlib
import platform
import secrets
import shutil
import threading
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from sae_harvest.common.atomic import make_folder
from sae_harvest.common.device import choose_device
from sae_harvest.common.errors import InputError, RunError, SaeHarvestError
from sae_harvest.common.private_apis import failure_behind
from sae_harvest.train.config import TrainConfig
from sae_harvest.train.parallel.distributed import (
    TIMEOUT,
    Parallel,
    PeerFailed,
    PeerLost,
    appears,
    group_of,
    passing,
)
from sae_harvest.train.run.checkpoint import saved_steps
from sae_harvest.train.run.exit_codes import may_pass
from sae_harvest.train.run.faults import explained
from sae_harvest.train.run.files import read_record
from sae_harvest.train.run.folder import EVALUATION_FILE, METRICS_FILE
from sae_harvest.train.run.interrupt import Interruption
from sae_harvest.train.run.metrics import last_metrics
from sae_harvest.train.run.records import Evaluation
from sae_harvest.train.run.trainer import OnPhase, RunResult, silent, train

POLL_SECONDS = 0.2
WITHOUT = "leave out --workers to train in one process"


class WorkerError(SaeHarvestError):
    """A worker's sentence, on its way to the command.

    passes: whether trying again may help. is_echo: whether it only says that another one failed.
    """

    def __init__(self, sentence: str, passes: bool, is_echo: bool) -> None:
        super().__init__(sentence)
        self.passes, self.is_echo = passes, is_echo

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (str(self), self.passes, self.is_echo)


@dataclass(frozen=True)
class Assignment:
    """The task of a worker; see `train.run.trainer.train`."""

    config: dict[str, Any]
    store: str
    out: str
    site: str | None
    device: str
    parallel: Parallel
    threads: int
    number: str  # of the command

    @property
    def seen(self) -> Path:
        return Path(self.out) / f".driver-{self.number}.tmp"

    @property
    def stop(self) -> Path:
        return Path(self.out) / f".stop-{self.number}.tmp"

    @property
    def ray_folder(self) -> Path:
        return Path(self.out) / f".ray-{self.number}.tmp"


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
    """`train.run.trainer.train` by several workers, each with a GPU or its share of the cores.

    The run is the same one with any number of workers and either way of division: another
    number may continue it.

    Args:
        device: cuda, cpu, or auto: cuda if every worker can have a GPU.
        workers: how many.
        parallel: what is divided among them.
        address: of a Ray cluster's head, or auto; None starts a Ray of our own on this machine.

    Raises:
        SaeHarvestError: as `train`; or a worker is gone, which may pass.
    """
    from sae_harvest.common import environment
    from sae_harvest.common import ray_cluster as cluster

    out = Path(out).absolute()
    with explained(out):
        make_folder(out)
    environment.set_defaults()
    with explained(out), _connected(address, workers):
        gpu = device == "cuda" or (device == "auto" and cluster.has_gpus(workers))
        assignment = Assignment(
            config=config.model_dump(mode="json"),
            store=str(store) if "://" in str(store) else str(Path(store).absolute()),
            out=str(out),
            site=site,
            device="cuda" if gpu else "cpu",
            parallel=parallel,
            threads=cluster.threads_per_worker(workers, gpu),
            number=secrets.token_hex(8),
        )
        assignment.seen.touch()
        try:
            return _watched(assignment, workers, config.steps, report)
        finally:
            assignment.seen.unlink(missing_ok=True)
            assignment.stop.unlink(missing_ok=True)
            shutil.rmtree(assignment.ray_folder, ignore_errors=True)


@contextlib.contextmanager
def _connected(address: str | None, workers: int) -> Iterator[None]:
    import ray

    from sae_harvest.common import ray_cluster as cluster

    cluster.connect(address, workers, WITHOUT)
    try:
        yield
    finally:
        ray.shutdown()  # ends a Ray of our own; of a cluster's, the workers


def _watched(assignment: Assignment, workers: int, steps: int, report: OnPhase) -> RunResult:
    """Starts the workers and waits for their end, or for a signal to stop them."""
    errors: list[BaseException] = []

    def fit() -> None:
        try:
            _fit(assignment, workers)
        except BaseException as error:  # to be raised where signals are
            errors.append(error)

    with Interruption() as interruption:
        # in a thread of its own: Ray Train would take SIGINT for itself
        thread = threading.Thread(target=fit, daemon=True)
        thread.start()
        while thread.is_alive():
            thread.join(POLL_SECONDS)
            if interruption.asked and not assignment.stop.exists():
                assignment.stop.touch()
            _show(assignment, steps, report)
    for error in errors:
        raise _reported(error)
    return _result(Path(assignment.out), steps, interruption.signal)


def _result(out: Path, steps: int, number: int | None) -> RunResult:
    """The result of a run, read from its folder; `number`: the signal that stopped it."""
    done = max(saved_steps(out), default=0)
    metrics = _metrics(out)
    if done < steps:
        return RunResult(done, False, metrics, None, number)
    remedy = "run the same command again"
    found = read_record(out / EVALUATION_FILE, Evaluation, "The run", remedy)
    return RunResult(done, True, metrics, found)


def _fit(assignment: Assignment, workers: int) -> None:
    """Has Ray Train start the workers, and waits for their end."""
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    gpu = assignment.device == "cuda"
    resources = {"CPU": assignment.threads} | ({"GPU": 1} if gpu else {})
    TorchTrainer(
        work,
        train_loop_config=asdict(assignment),
        torch_config=TorchConfig(
            backend="nccl" if gpu else "gloo", timeout_s=int(TIMEOUT.total_seconds())
        ),
        scaling_config=ScalingConfig(
            num_workers=workers, use_gpu=gpu, resources_per_worker=resources
        ),
        run_config=RunConfig(
            name=assignment.number,
            storage_path=str(assignment.ray_folder),
            failure_config=FailureConfig(max_failures=0, controller_failure_limit=0),
        ),
    ).fit()


def work(settings: dict[str, Any]) -> None:
    """The work of a worker, after torch.distributed is initialised."""
    import numba
    import ray.train.torch

    assignment = Assignment(**settings)
    torch.set_num_threads(assignment.threads)
    numba.set_num_threads(min(assignment.threads, numba.config.NUMBA_NUM_THREADS))
    config = TrainConfig.model_validate(assignment.config)
    try:
        if not appears(assignment.seen):
            raise InputError(
                f"{assignment.out} on {platform.node()} is not the folder that the command was "
                "given; give an --out on storage that all machines of the run share."
            )
        choose_device(assignment.device)
        device = ray.train.torch.get_device()
        group = group_of(assignment.parallel, config.n_latents, config.batch_rows, device)
        train(
            config,
            assignment.store,
            assignment.out,
            assignment.site,
            assignment.device,
            group=group,
            asked=lambda: group.rank == 0 and assignment.stop.exists(),
        )
    except SaeHarvestError as error:
        echo = isinstance(error, PeerLost | PeerFailed)
        raise WorkerError(str(error), may_pass(error), echo) from None


def _reported(error: BaseException) -> BaseException:
    """The sentence that says why the run ended, of all that its workers say."""
    failures = [*getattr(error, "worker_failures", {}).items()]
    own = [found for _, found in failures if isinstance(found, WorkerError)]
    if own and (real := [found for found in own if not found.is_echo]):
        return _sentence(real[0])
    for rank, found in failures:
        found = failure_behind(found)
        if not isinstance(found, WorkerError):
            return _gone(rank, found)
    return _sentence(own[0]) if own else error


def _sentence(error: WorkerError) -> SaeHarvestError:
    found = RunError(str(error))
    if error.passes:
        found.__cause__ = passing(str(error))
    return found


def _gone(rank: int, error: BaseException) -> BaseException:
    """The error for a worker that ended without an error of its own."""
    from ray.exceptions import RayError

    from sae_harvest.common import ray_cluster as cluster

    if isinstance(error, ModuleNotFoundError):
        return RunError(
            f"Worker {rank} found no {error.name} on its machine; install the same version of "
            "sae-harvest on every node, in the Python that its Ray runs in."
        )
    if not isinstance(error, RayError):
        return error
    why = cluster.reason(error)
    found = RunError(
        f"Worker {rank} is gone ({why}); the same command continues from the last checkpoint."
    )
    found.__cause__ = passing(why)
    return found


def _show(assignment: Assignment, steps: int, report: OnPhase) -> None:
    """Reports how far the run is, by its metrics."""
    last = _metrics(Path(assignment.out))
    if not last:
        report("preparing", 0, steps, "")
    else:
        phase = "training" if last["step"] < steps else "evaluating"
        report(phase, last["step"], steps, f"{last['tokens_per_second']:,} tokens/s")


def _metrics(out: Path) -> dict[str, Any]:
    """The newest metrics of the run; empty if there are none, or for a moment no way to them."""
    with contextlib.suppress(OSError):
        return last_metrics(out / METRICS_FILE)
    return {}
