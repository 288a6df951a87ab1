"""Figures of a table of effects, with intervals clustered by document.

    ablation_sparsity              mean of (l1 / l2)^2 / (vocabulary tokens); smaller is sparser
    ablation_sparsity_difference   the same for the SAE minus random directions, pair by pair: both
                                   change the same positions by the same norms
    ablation_kl                    mean of kl, in nats per token
    ablation_delta_ce              mean of delta_ce, in nats per token

The part of a figure is the operation. An ablation that moves no logit at all has no sparsity and is
left out of the first two.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from sae_harvest.pipelines.evaluate.figures import SAE_ITSELF, Figure, figure_of_sums
from sae_harvest.pipelines.evaluate.intervals import Floats, cluster_sums, ratio, row_clusters
from sae_harvest.store.reader import ActivationStore

RANDOM_DIRECTION = "random direction"


def ablation_figures(effects: pa.Table, store: ActivationStore) -> Iterator[Figure]:
    """Yield the figures of a table of effects.

    Args:
        effects: the table; see docs/tables.md.
        store: the store that its rows belong to.
    """
    cluster = row_clusters(store, effects["row"].to_numpy())
    metrics = {
        "ablation_sparsity": _sparsity(effects),
        "ablation_kl": effects["kl"].to_numpy(),
        "ablation_delta_ce": effects["delta_ce"].to_numpy(),
    }
    subject, operation = (np.array(effects[name].to_pylist()) for name in ("subject", "operation"))
    for part in np.unique(operation).tolist():
        of_part = operation == part
        for name in np.unique(subject[of_part]).tolist():
            here = of_part & (subject == name)
            for metric, values in metrics.items():
                yield _figure(metric, name, part, values[here], cluster[here])
        # the rows of both subjects are in one order, with the same latents on the same rows
        mine, other = (of_part & (subject == name) for name in (SAE_ITSELF, RANDOM_DIRECTION))
        sparsity = metrics["ablation_sparsity"]
        difference = sparsity[mine] - sparsity[other]
        yield _figure("ablation_sparsity_difference", SAE_ITSELF, part, difference, cluster[mine])


def _sparsity(effects: pa.Table) -> Floats:
    """Return the sparsity of each effect, NaN where no logit moves, float64 [rows]."""
    l1, l2 = effects["l1"].to_numpy(), effects["l2"].to_numpy()
    size = effects["tokens"].to_numpy().astype(np.float64) * effects["vocabulary"].to_numpy()
    ratio = np.divide(l1, l2, out=np.full(len(l1), np.nan), where=l2 > 0)
    sparsity: Floats = ratio**2 / size
    return sparsity


def _figure(
    metric: str, subject: str, part: str, values: Floats, cluster: npt.NDArray[np.int64]
) -> Figure:
    """Return the mean of the values that are defined, with its interval."""
    defined = np.isfinite(values)
    values, cluster = values[defined], cluster[defined]
    sums = cluster_sums(cluster, np.stack([values, np.ones_like(values)], 1))
    return figure_of_sums(metric, subject, part, sums, _mean, len(values), "firings")


def _mean(sums: Floats) -> Floats:
    """Divide sums [..., 2] of values by their numbers; NaN without values."""
    return ratio(sums[..., 0], sums[..., 1])
