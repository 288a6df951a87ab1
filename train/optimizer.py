"""Clipping, Adam, unit decoder rows and the running average of weights, in that order."""

from __future__ import annotations

import torch
from torch import Tensor

from train.config import TrainConfig
from train.kernels import AdamNumbers, Gradients
from train.sae import SAE


class Optimizer:
    """Adam on an SAE's four tensors, and the exponential average of its weights.

    Gradients come with the decoder's part along its rows already taken out (`train_step`), so a
    step is: clip, Adam, renormalise decoder rows, average.
    """

    def __init__(self, sae: SAE, config: TrainConfig) -> None:
        self._config = config
        self.step_number = 0
        tensors = sae.tensors()
        self.first = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
        self.second = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
        self.average = {name: tensor.clone() for name, tensor in tensors.items()}

    def tensors(self) -> dict[str, Tensor]:
        """Everything a checkpoint needs besides `step_number`: first.W_enc, second.W_enc, ..."""
        groups = {"first": self.first, "second": self.second, "average": self.average}
        return {
            f"{group}.{name}": tensor
            for group, tensors in groups.items()
            for name, tensor in tensors.items()
        }

    def step(self, sae: SAE, gradients: Gradients, grad_norm: float) -> None:
        """Changes the SAE's weights in place.

        Args:
            sae: the weights.
            gradients: as `train_step` left them.
            grad_norm: their norm together.
        """
        config = self._config
        before = self.step_number
        self.step_number = number = before + 1
        keep = 0.0 if config.ema_decay is None else config.ema_decay
        numbers = AdamNumbers(
            scale=min(1.0, config.clip_norm / grad_norm) if grad_norm > 0 else 1.0,
            rate=config.learning_rate / (1 - config.adam_beta1**number),
            beta1=config.adam_beta1,
            beta2=config.adam_beta2,
            root=(1 - config.adam_beta2**number) ** -0.5,
            eps=config.adam_eps,
            # an average over the first steps would otherwise be mostly the initial weights
            keep=min(keep, (1 + before) / (10 + before)),
        )
        by_name = {
            "W_enc": gradients.enc,
            "W_dec": gradients.dec,
            "b_enc": gradients.bias,
            "b_dec": gradients.b_dec,
        }
        for name, weight in sae.tensors().items():
            sae.kernels.adam(
                _rows(weight),
                _rows(by_name[name]),
                _rows(self.first[name]),
                _rows(self.second[name]),
                _rows(self.average[name]),
                numbers,
                unit_rows=name == "W_dec",
            )
        sae.weights_changed()

    def averaged(self, sae: SAE) -> SAE:
        """An SAE of the averaged weights, for use.

        An average of unit rows is a little shorter than one: each latent's length moves from the
        decoder to the encoder, which leaves its share of the reconstruction as it was.
        """
        length = torch.linalg.vector_norm(self.average["W_dec"], dim=1)  # [n_latents]
        return SAE(
            sae.config,
            W_enc=self.average["W_enc"] * length.unsqueeze(1),
            W_dec=self.average["W_dec"] / length.unsqueeze(1),
            b_enc=self.average["b_enc"] * length,
            b_dec=self.average["b_dec"].clone(),
        )


def _rows(tensor: Tensor) -> Tensor:
    """A view [rows, d] of a matrix or a vector."""
    return tensor.view(1, -1) if tensor.dim() == 1 else tensor
