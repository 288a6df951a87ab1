"""Clipping, Adam, unit decoder rows and the running average of weights, in that order."""

from __future__ import annotations

import torch
from torch import Tensor

from sae_harvest.train.config import TrainConfig
from sae_harvest.train.sae.kernels import AdamNumbers
from sae_harvest.train.sae.sae import SAE
from sae_harvest.train.step.step_context import Workspace


class Optimizer:
    """Adam on the trained tensors of an SAE, and their exponential average.

    Thresholds of JumpReLU are trained through their logarithm. A transcoder's b_in is constant, and
    BatchTopK's threshold is a running mean (`train.step.learner`).

    The decoder's gradients have no part along its rows (`train_step` removes it). So a step is:
    clip, Adam, normalise decoder rows, average.
    """

    def __init__(self, sae: SAE, config: TrainConfig) -> None:
        self._config = config
        self.step_number = 0
        self.trained = {
            name: tensor
            for name, tensor in sae.tensors().items()
            if name not in ("b_in", "threshold")
        }
        if config.activation == "jumprelu":
            self.trained["threshold"] = sae.extra["threshold"].log()
        self.first = {name: torch.zeros_like(tensor) for name, tensor in self.trained.items()}
        self.second = {name: torch.zeros_like(tensor) for name, tensor in self.trained.items()}
        self.average = {name: tensor.clone() for name, tensor in self.trained.items()}

    def tensors(self) -> dict[str, Tensor]:
        """Everything a checkpoint needs besides `step_number`: first.W_enc, second.W_enc, ..."""
        groups = {"first": self.first, "second": self.second, "average": self.average}
        found = {
            f"{group}.{name}": tensor
            for group, tensors in groups.items()
            for name, tensor in tensors.items()
        }
        if "threshold" in self.trained:
            found["log.threshold"] = self.trained["threshold"]
        return found

    def step(self, sae: SAE, workspace: Workspace, grad_norm: float) -> None:
        """Change the SAE's weights in place.

        Args:
            sae: the weights.
            workspace: the gradients from `train_step`.
            grad_norm: norm of the whole gradient.
        """
        config = self._config
        before = self.step_number
        self.step_number = number = before + 1
        keep = 0.0 if config.ema_decay is None else config.ema_decay
        numbers = AdamNumbers(
            scale=min(1.0, config.clip_norm / grad_norm) if grad_norm > 0 else 1.0,
            rate=config.learning_rate_at(before) / (1 - config.adam_beta1**number),
            beta1=config.adam_beta1,
            beta2=config.adam_beta2,
            root=(1 - config.adam_beta2**number) ** -0.5,
            eps=config.adam_eps,
            # an average over the first steps would otherwise be mostly the initial weights
            keep=min(keep, (1 + before) / (10 + before)),
        )
        gradients = workspace.gradients
        by_name = {
            "W_enc": gradients.enc,
            "W_dec": gradients.dec,
            "b_enc": gradients.bias,
            "b_dec": gradients.b_dec,
            **workspace.extra,
        }
        for name, weight in self.trained.items():
            sae.kernels.adam(
                _rows(weight),
                _rows(by_name[name]),
                _rows(self.first[name]),
                _rows(self.second[name]),
                _rows(self.average[name]),
                numbers,
                unit_rows=name == "W_dec",
            )
        if "threshold" in self.trained:
            torch.exp(self.trained["threshold"], out=sae.extra["threshold"])
        sae.weights_changed()

    def averaged(self, sae: SAE) -> SAE:
        """Return an SAE with the averaged weights.

        The average of unit rows is a little shorter than 1. Each row's length is moved from the
        decoder to the encoder and to thresholds, which keeps the latent's part of the
        reconstruction. BatchTopK's threshold is already for unit rows.
        """
        average = self.average
        length = torch.linalg.vector_norm(average["W_dec"], dim=1)  # [n_latents]
        tensors = {
            "W_enc": average["W_enc"] * length.unsqueeze(1),
            "W_dec": average["W_dec"] / length.unsqueeze(1),
            "b_enc": average["b_enc"] * length,
            "b_dec": average["b_dec"].clone(),
        }
        extra = {name: tensor.clone() for name, tensor in sae.extra.items()}
        if "threshold" in average:
            extra["threshold"] = average["threshold"].exp() * length
        if "r_mag" in average:
            extra |= {"r_mag": average["r_mag"].clone(), "b_mag": average["b_mag"] * length}
        return SAE(sae.config, **tensors, **extra)


def _rows(tensor: Tensor) -> Tensor:
    """Return a view [rows, d] of a matrix or a vector."""
    return tensor.view(1, -1) if tensor.dim() == 1 else tensor
