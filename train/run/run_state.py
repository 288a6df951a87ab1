"""The state of a pass: a stream of batches, and the SAEs that are trained on it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sae_harvest.store.loading.loader import Batch, ShuffledLoader
from sae_harvest.store.reader import ActivationStore
from sae_harvest.train.config import TrainConfig
from sae_harvest.train.parallel.process_group import ProcessGroup
from sae_harvest.train.run.checkpoint import discard_after, load_checkpoint, save_checkpoint
from sae_harvest.train.run.files import write_json
from sae_harvest.train.run.folder import FAILED_FILE, METRICS_FILE, finished_evaluation
from sae_harvest.train.run.metrics import MetricsFile
from sae_harvest.train.sae.sharded_sae import Dictionary, ShardedSAE, digest_of, save_part
from sae_harvest.train.step.initialization import SAMPLE_ROWS
from sae_harvest.train.step.learner import Diverged, Learner

ALONE = ProcessGroup()


class BatchStream:
    """The stream of batches that all members are trained on.

    Args:
        config: batch_rows, target_site, order_seed and rule decide the stream.
        store, site: the rows to read.
        device: device of the batches.
        group: processes that share the work; each gets its part of the rows.
    """

    def __init__(
        self,
        config: TrainConfig,
        store: ActivationStore,
        site: str,
        device: torch.device,
        group: ProcessGroup = ALONE,
    ) -> None:
        self.store, self.site, self.device, self.group = store, site, device, group
        self.batch_rows = config.batch_rows
        self._config = config
        self.loader = self._open(group.rank % group.row_parts, group.row_parts)
        self._beginning = self.loader.state()
        self._sample: tuple[Tensor, Tensor | None] | None = None

    def _open(self, rank: int, world: int) -> ShuffledLoader:
        config = self._config
        return ShuffledLoader(
            self.store,
            self.site,
            config.batch_rows,
            seed=config.seed if config.order_seed is None else config.order_seed,
            rule=config.rule,
            target_site=config.target_site,
            rank=rank,
            world=world,
            device=str(self.device),
        )

    def sample(self) -> tuple[Tensor, Tensor | None]:
        """Return the rows that initialise weights, float32 [rows, d_in], and their targets if any.

        They are the first rows of the order, the same in every process.
        """
        if self._sample is None:
            self.seek(None)
            loader = self.loader if self.group.row_parts == 1 else self._open(0, 1)
            try:
                self._sample = first_rows(loader)
            finally:
                loader.close()
            self.seek(None)
        return self._sample

    def seek(self, state: dict[str, Any] | None) -> None:
        """Move to the position of a checkpoint, or to the beginning."""
        self.loader.load_state(self._beginning if state is None else state)

    def close(self) -> None:
        self.loader.close()


def first_rows(loader: ShuffledLoader) -> tuple[Tensor, Tensor | None]:
    """Return the first SAMPLE_ROWS rows of the loader's order, or an epoch, on the CPU."""
    batches: list[Batch] = []
    rows = 0
    while rows < SAMPLE_ROWS and len(batches) < loader.batches_per_epoch:
        batches.append(loader.next_batch())
        rows += len(batches[-1].x)
    x = torch.cat([batch.x.cpu() for batch in batches])[:SAMPLE_ROWS]
    targets = [batch.target.cpu() for batch in batches if batch.target is not None]
    return x, torch.cat(targets)[:SAMPLE_ROWS] if targets else None


class TrainingRun:
    """One dictionary in training, and its folder.

    With several processes, the first one writes the records, and each process writes its part of
    checkpoints and of the result.
    """

    def __init__(self, config: TrainConfig, out: Path, stream: BatchStream) -> None:
        self.config, self.out = config, out
        self.metrics: dict[str, Any] = {}
        self.failure: Diverged | None = None
        self._stream = stream
        self._writes = stream.group.rank == 0
        self._learner: Learner | None = None
        self._log: MetricsFile | None = None
        self._saved = 0

    @property
    def learner(self) -> Learner:
        assert self._learner is not None, "not begun"
        return self._learner

    @property
    def step(self) -> int:
        return self.learner.step

    @property
    def is_live(self) -> bool:
        """Whether steps remain and training has not failed."""
        return self.failure is None and self.step < self.config.steps

    def begin(self, step: int) -> dict[str, Any] | None:
        """Start at step 0 with new weights, or at a later step from its checkpoint.

        Returns:
            The loader's state at that step; None at step 0.
        """
        stream = self._stream
        self._saved = step
        if step == 0:
            sample, target = stream.sample()
            model = stream.store.plan["model"]
            self._learner = Learner.begin(
                self.config, stream.site, sample, target, stream.device, model, stream.group
            )
            position = None
        else:
            saved = load_checkpoint(self.out, step, str(stream.device), stream.group)
            numbers = dict(saved.state)
            position = numbers.pop("loader")
            self._learner = Learner.restore(
                self.config, saved.sae, saved.tensors, numbers, stream.device, stream.group
            )
        if self._writes:
            discard_after(self.out, step)
            (self.out / FAILED_FILE).unlink(missing_ok=True)
        return position

    @contextmanager
    def logging(self) -> Iterator[None]:
        """Open the metrics file for `record` while the block runs."""
        path = self.out / METRICS_FILE
        self._log = self._stream.group.together(
            lambda: MetricsFile(path, self.step) if self._writes else None
        )
        with self._log or nullcontext():
            yield

    def _sync_log(self) -> None:
        if self._log is not None:
            self._log.sync()

    def advance(self, batch: Batch) -> None:
        """Do one step. A divergence is kept as `failure`."""
        try:
            self.metrics = self.learner.advance(batch.x, batch.target)
        except Diverged as error:
            self.failure = error
            if self._writes:
                failed = {"step": self.step + 1, "sentence": str(error)}
                write_json(self.out / FAILED_FILE, failed)

    def record(self, rate: float) -> None:
        """Write the last step's metrics as a line of the metrics file."""
        if self._log is not None and self.failure is None:
            self._log.write({**self.metrics, "tokens_per_second": round(rate)})

    def save(self) -> None:
        """Save a checkpoint, unless this step has one."""
        if self.failure is not None or self._saved == self.step:
            return
        learner, stream = self.learner, self._stream
        stream.group.together(self._sync_log)
        state = {**learner.numbers(), "loader": stream.loader.state()}
        save_checkpoint(
            self.out,
            self.step,
            learner.sae,
            learner.tensors(),
            state,
            self.config.n_latents,
            stream.group,
        )
        self._saved = self.step

    def result(self) -> Dictionary:
        """Return the finished dictionary, after writing it to the folder unless it exists there."""
        sae, group = self.learner.result(), self._stream.group
        if group.latent_parts > 1:
            save_part(self.out, sae, self.config.n_latents, group)
            digest = digest_of(self.out) if self._writes else ""
            return ShardedSAE(sae, self.config.n_latents, group, digest)
        if self._writes and finished_evaluation(self.out, sae.digest) is None:
            sae.save(self.out)
        return sae

    def release(self) -> None:
        """Free the learner's memory."""
        self._learner = None
