"""One dictionary in training: batches in, metrics out. It knows no files, folders or signals."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from sae_harvest.common.errors import RunError
from sae_harvest.train.config import TrainConfig
from sae_harvest.train.parallel.process_group import ProcessGroup
from sae_harvest.train.sae.sae import SAE
from sae_harvest.train.step.initialization import initial_sae, prepare
from sae_harvest.train.step.loss_and_gradients import StepResult, train_step
from sae_harvest.train.step.optimizer import Optimizer
from sae_harvest.train.step.step_context import Workspace

THRESHOLD_DECAY = 0.999  # share of BatchTopK's threshold kept each step; less at the start


class Diverged(RunError):
    """A loss or a gradient is not finite: training cannot go on from here."""


class Learner:
    """An SAE, its optimizer, and the time since each latent last fired.

    If a group divides the latents, the learner holds this process's part of them.
    """

    def __init__(
        self,
        config: TrainConfig,
        sae: SAE,
        total_variance: float,
        group: ProcessGroup | None = None,
    ) -> None:
        """Use `begin` or `restore` instead."""
        self.config, self.sae = config, sae
        self._group = group or ProcessGroup()
        self._total_variance = total_variance
        self._optimizer = Optimizer(sae, config)
        # tokens seen when each latent last fired
        self._last_fired = torch.zeros(len(sae.W_enc), dtype=torch.int64, device=sae.device)
        self._workspace = Workspace(sae, config.batch_rows // self._group.row_parts)

    @classmethod
    def begin(
        cls,
        config: TrainConfig,
        site: str,
        sample: Tensor,
        target_sample: Tensor | None,
        device: torch.device,
        model: dict[str, Any],
        group: ProcessGroup | None = None,
    ) -> Learner:
        """Return the first state of a run.

        Args:
            site: site of the rows.
            sample: rows that decide scale, offset and sparsity, [n, d_in]; the same in every
                process.
            target_sample: the same rows at a transcoder's target site, [n, d_out].
            model: name and weights as in the store's plan.
            group: the processes that train together; None for this process alone.
        """
        start = prepare(sample, config.normalization, target_sample)
        sae = initial_sae(config, site, start, device, model, group)
        return cls(config, sae, start.total_variance, group)

    @classmethod
    def restore(
        cls,
        config: TrainConfig,
        sae: SAE,
        tensors: dict[str, Tensor],
        numbers: dict[str, Any],
        device: torch.device,
        group: ProcessGroup | None = None,
    ) -> Learner:
        """Return the state from which `sae`, `tensors()` and `numbers()` were taken.

        Args:
            sae: the SAE, on the device; training changes it in place.

        Raises:
            RunError: they do not fit the configuration.
        """
        first, last = (group or ProcessGroup()).latents(config.n_latents)
        if (sae.config.activation, sae.config.n_latents) != (config.sae_activation, last - first):
            raise RunError(
                f"The checkpoint has a {sae.config.activation} SAE with {sae.config.n_latents} "
                f"latents, this run trains {config.sae_activation} with {last - first}; choose "
                "another --out."
            )
        learner = cls(config, sae, numbers["total_variance"], group)
        learner._optimizer.step_number = numbers["step"]
        for name, tensor in learner.tensors().items():
            saved = tensors.get(name)
            if saved is None or saved.shape != tensor.shape or saved.dtype != tensor.dtype:
                raise RunError(
                    f"The checkpoint's optimizer has no {name} {list(tensor.shape)} of "
                    f"{tensor.dtype}; delete that checkpoint to go on from an earlier one."
                )
            tensor.copy_(saved.to(device))
        return learner

    @property
    def step(self) -> int:
        """Steps done."""
        return self._optimizer.step_number

    @property
    def tokens(self) -> int:
        """Rows trained on, over all processes."""
        return self.step * self.config.batch_rows

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors that a checkpoint needs besides the SAE's own; not copies."""
        return {**self._optimizer.tensors(), "last_fired": self._last_fired}

    def numbers(self) -> dict[str, Any]:
        """Return the numbers that a checkpoint needs besides tensors, as JSON values."""
        return {"step": self.step, "total_variance": self._total_variance}

    def result(self) -> SAE:
        """Return the SAE with averaged weights."""
        return self._optimizer.averaged(self.sae)

    def advance(self, x: Tensor, target: Tensor | None = None) -> dict[str, Any]:
        """Do one step and return its metrics.

        Args:
            x: this process's rows, float32 [rows, d_in].
            target: the same rows at a transcoder's target site, [rows, d_out].

        Returns:
            step, tokens, loss, fvu, auxk, further losses by name, dead_share,
            dead_after_tokens, l0, grad_norm and lr; see `StepResult`.

        Raises:
            Diverged: a loss or a gradient is not finite.
        """
        config = self.config
        lr = config.learning_rate_at(self.step)
        dead = self.tokens - self._last_fired >= config.dead_after
        result = train_step(
            self.sae,
            x,
            config,
            self._total_variance,
            dead,
            self._workspace,
            step=self.step,
            target=target,
            group=self._group,
        )
        if not (math.isfinite(result.total) and math.isfinite(result.grad_norm)):
            raise Diverged(
                f"Training diverged at step {self.step + 1} (loss {result.loss}, gradient norm "
                f"{result.grad_norm}); use a lower --lr than {config.learning_rate:g} and "
                "another --out."
            )
        self._optimizer.step(self.sae, self._workspace, result.grad_norm)
        self._follow_threshold(result)
        self._last_fired[result.fired] = self.tokens
        n_dead = int(self._group.sum_latents(dead.sum()))
        return {
            "step": self.step,
            "tokens": self.tokens,
            "loss": result.loss,
            "fvu": result.fvu,
            "auxk": result.auxk,
            **result.penalties,
            "dead_share": n_dead / config.n_latents,
            "dead_after_tokens": config.dead_after,
            "l0": result.l0,
            "grad_norm": result.grad_norm,
            "lr": lr,
        }

    def _follow_threshold(self, result: StepResult) -> None:
        """Update BatchTopK's threshold, a running mean of the least value that a batch kept."""
        if result.least_kept is not None:
            done = self.step - 1
            keep = min(THRESHOLD_DECAY, (1 + done) / (10 + done))
            self.sae.extra["threshold"].mul_(keep).add_((1 - keep) * result.least_kept)
