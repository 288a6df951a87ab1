"""Training objectives: one module per activation function and its penalty.

Each has one function that takes a batch, chooses its pairs, and leaves the gradients of

    reconstruction loss + penalty

in the batch's workspace. Penalties are made free of scale: a value v counts in units of the square
root of the total variance, as the squared error counts in units of the total variance. AuxK, which
is the same for all, is `train.step.auxiliary`.
"""

from __future__ import annotations

from collections.abc import Callable

from sae_harvest.train.step.objectives.batchtopk import batchtopk
from sae_harvest.train.step.objectives.gated import gated
from sae_harvest.train.step.objectives.jumprelu import jumprelu
from sae_harvest.train.step.objectives.outcome import Outcome
from sae_harvest.train.step.objectives.relu_kl import relu_kl
from sae_harvest.train.step.objectives.relu_l1 import relu_l1
from sae_harvest.train.step.objectives.topk import topk
from sae_harvest.train.step.step_context import StepContext

OBJECTIVES: dict[str, Callable[[StepContext], Outcome]] = {
    "topk": topk,
    "batchtopk": batchtopk,
    "jumprelu": jumprelu,
    "relu_l1": relu_l1,
    "relu_kl": relu_kl,
    "gated": gated,
}
