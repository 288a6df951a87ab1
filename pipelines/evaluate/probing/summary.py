"""Figures and the table of probes, from what was measured."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from sae_harvest.pipelines.evaluate.figures import Figure, defined, figure_of_sums
from sae_harvest.pipelines.evaluate.intervals import Floats, percentiles
from sae_harvest.pipelines.evaluate.probing.examples import DOCUMENTS
from sae_harvest.pipelines.evaluate.probing.losses import TaskLosses, mean_loss
from sae_harvest.pipelines.evaluate.probing.measure import CONSTANT, Measured
from sae_harvest.pipelines.evaluate.probing.newton import BIAS, LOSS, THRESHOLD, WEIGHT
from sae_harvest.pipelines.evaluate.probing.pooling import Pooling
from sae_harvest.pipelines.evaluate.probing.scores import MEASURES
from sae_harvest.pipelines.evaluate.probing.sparse import SparseProbe
from sae_harvest.pipelines.evaluate.probing.table import ALL, TEST, TRAIN, ProbeRow

LOSSES = {ALL: "probe_loss", TEST: "probe_loss_test"}  # metric by scored documents
RELATIVE = "_relative"  # suffix: the mean over tasks of the loss over that of the constant
EVERY_TASK = "all tasks"


def figures_of(measured: Sequence[Measured]) -> Iterator[Figure]:
    """Yield means over tasks: of documents, of rows, and of both."""
    for part, some in _parts(measured):
        for method, scored in some[0].losses:
            losses = [m.losses[method, scored] for m in some]
            constants = [m.losses[CONSTANT, scored] for m in some]
            yield from _loss_figures(method, scored, part, losses, constants)
        by_method: dict[tuple[str, str], list[SparseProbe]] = defaultdict(list)
        for probe in (probe for m in some for probe in m.sparse):
            by_method[probe.method, _features(probe)].append(probe)
        for (method, features), probes in by_method.items():
            values = np.mean([probe.scores.values for probe in probes], axis=0)
            low, high = percentiles(np.mean([probe.scores.resampled for probe in probes], axis=0))
            for i, name in enumerate(MEASURES):
                limits = float(values[i]), float(low[i]), float(high[i])
                yield Figure(
                    f"probe_{name}", method, f"{features}{part}", *limits, len(probes), "tasks"
                )


def _parts(measured: Sequence[Measured]) -> Iterator[tuple[str, Sequence[Measured]]]:
    for m in measured:
        yield ("text tasks" if m.examples.unit == DOCUMENTS else "token tasks"), [m]
    if len(measured) > 1:
        yield EVERY_TASK, measured


def _features(probe: SparseProbe) -> str:
    return f"k = {len(probe.features)}, " if len(probe.features) else ""


def _loss_figures(
    method: str,
    scored: str,
    part: str,
    losses: Sequence[TaskLosses],
    constants: Sequence[TaskLosses],
) -> Iterator[Figure]:
    """Yield the mean loss over tasks, and the mean of its ratio to the constant's."""
    sums = np.concatenate([loss.sums for loss in losses], axis=1)  # [256, tasks, 2]
    beside = np.concatenate([constant.sums for constant in constants], axis=1)

    def mean(sums: Floats) -> Floats:
        return np.nanmean(mean_loss(sums), axis=-1)

    def relative(sums: Floats) -> Floats:
        return np.nanmean(mean_loss(sums[..., :2]) / mean_loss(sums[..., 2:]), axis=-1)

    for suffix, given, figure in (
        ("", sums, mean),
        (RELATIVE, np.concatenate([sums, beside], axis=2), relative),
    ):
        if suffix and method == CONSTANT:
            continue
        metric = LOSSES[scored] + suffix
        yield figure_of_sums(metric, method, part, given, figure, sums.shape[1], "tasks")


def rows_of(measured: Measured, pooling: Pooling) -> Iterator[ProbeRow]:
    """Yield the rows of the table."""
    examples = measured.examples
    pooled = pooling if examples.unit == DOCUMENTS else None
    for (method, scored), losses in measured.losses.items():
        low, high = losses.limits
        counts = _counts(examples.codes if scored == ALL else examples.part(test=True))
        fitted = ALL if scored == ALL else TRAIN
        for t, task in enumerate(examples.names):
            latents, fits = losses.best.latent[t], losses.best.fit[t]
            row = ProbeRow(
                task, examples.unit, method, min(1, len(latents)), fitted, scored, 0, *counts[t],
                pooled, loss=float(losses.loss[t]), loss_low=defined(low[t]),
                loss_high=defined(high[t]),
            )  # fmt: skip
            if len(latents) == 0:  # the constant
                yield row
            for rank, (latent, fit) in enumerate(zip(latents.tolist(), fits, strict=True)):
                finite = bool(np.isfinite(fit[WEIGHT]))
                known: dict[str, Any] = {
                    "features": [latent],
                    "weights": [float(fit[WEIGHT])],
                    "bias": float(fit[BIAS]),
                    "threshold": None if finite else float(fit[THRESHOLD]),
                }
                if rank == 0:
                    yield replace(row, **known)
                elif scored == ALL:
                    loss: dict[str, Any] = {
                        "loss": float(fit[LOSS]),
                        "loss_low": None,
                        "loss_high": None,
                    }
                    yield replace(row, rank=rank, **known, **loss)
    for probe in measured.sparse:
        yield _sparse_row(measured, probe, pooled)


def _sparse_row(measured: Measured, probe: SparseProbe, pooled: Pooling | None) -> ProbeRow:
    examples, sample = measured.examples, measured.drawn[probe.task]
    tested = sample.y[sample.test]
    low, high = probe.scores.limits
    columns: dict[str, Any] = {}
    for i, name in enumerate(MEASURES):
        columns |= {
            name: float(probe.scores.values[i]),
            f"{name}_low": defined(low[i]),
            f"{name}_high": defined(high[i]),
        }
    k = len(probe.features)
    return ProbeRow(
        examples.names[probe.task], examples.unit, probe.method, k or None, TRAIN, TEST, 0,
        int((tested == 0).sum()), int((tested == 1).sum()), pooled,
        probe.features.tolist() if k else None,
        probe.probe.weights.tolist(),
        probe.probe.bias,
        **columns,
    )  # fmt: skip


def _counts(codes: Any) -> list[tuple[int, int]]:
    return [(int((column == 0).sum()), int((column == 1).sum())) for column in codes.T]
