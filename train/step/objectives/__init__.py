"""Training objectives: one module per activation function and its penalty.

Each module has one function. It takes a batch, chooses its pairs, and writes the gradients of

    reconstruction loss + penalty

into the batch's workspace. Penalties do not depend on the scale of the data: activations count in
units of the square root of the total variance, and the squared error in units of the total
variance.
AuxK is the same for all objectives: see `train.step.auxiliary`.
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
