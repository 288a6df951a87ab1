"""All parts of one SAE's evaluation: what is measured, and what each part depends on."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import xxhash

from sae_harvest.common.device import choose_device
from sae_harvest.harvest.model.models import load_model
from sae_harvest.pipelines.evaluate.baselines import baselines
from sae_harvest.pipelines.evaluate.compute_equivalent import ComputeTable
from sae_harvest.pipelines.evaluate.downstream import (
    CE,
    CE_MODEL,
    KL,
    TOKENS,
    controls,
    downstream_figures,
    heldout_contexts,
    spliced_losses,
)
from sae_harvest.pipelines.evaluate.figures import SAE_ITSELF, Figure
from sae_harvest.pipelines.evaluate.reconstruction import (
    PARTS,
    HeldoutRows,
    Reconstruction,
    reconstruction,
)
from sae_harvest.pipelines.evaluate.report.parts import Curve, Part, Parts
from sae_harvest.pipelines.evaluate.report.settings import EvaluationSettings
from sae_harvest.pipelines.evaluate.splicing import Splice, replaced_rows, replaced_site
from sae_harvest.pipelines.evaluate.weights import weight_figures
from sae_harvest.pipelines.features.encoding.dictionary import sae_fits
from sae_harvest.pipelines.source import model_of
from sae_harvest.store.reader import ActivationStore
from sae_harvest.train.evaluate import batches, medians_of
from sae_harvest.train.sae.sae import SAE

L0_ROWS = 4096  # rows that give the k of the baselines
DENSITY_EDGES = np.arange(-6.0, 0.25, 0.25)  # log10 of the share of rows on which a latent fires

Progress = Callable[[str], Callable[[int, int], None]]


@dataclass(frozen=True, eq=False)
class Subject:
    """An SAE that is evaluated."""

    name: str
    """Name in the report."""

    path: Path
    """Its folder."""

    sae: SAE
    """The SAE."""


@dataclass(frozen=True, eq=False)
class Evaluation:
    """The measured parts of one SAE, by name."""

    name: str
    """Name of the SAE in the report."""

    saes: Sequence[SAE]
    """The SAE; or several SAEs that were evaluated in one forward pass."""

    parts: dict[str, Part]
    """Name of the part → the part."""


def evaluate_parts(
    report: Path,
    store: ActivationStore,
    subject: Subject,
    settings: EvaluationSettings,
    device: str,
    progress: Progress,
) -> Evaluation:
    """Measure every part of an SAE's evaluation, or take it from the report's folder.

    Args:
        report: folder of the report.
        store: a store with the SAE's site.
        subject: the SAE.
        settings: sample sizes.
        device: device of the model: cpu, cuda or auto. The SAE stays where it is.
        progress: given the name of a part, returns a function of things done and to do.

    Raises:
        RunError: SAE and store do not fit, or a file of the report is damaged.
        InputError: nothing is held out, or the table of compute cannot be read.
    """
    sae = subject.sae
    sae_fits(store, sae, subject.path)
    table = None if settings.compute_table is None else ComputeTable.read(settings.compute_table)
    kept = Parts(report)
    digest = sae.digest
    shared = {"store": store.digest, "sae": digest}
    beside: dict[str, SAE] = {}

    def dictionaries() -> dict[str, SAE]:
        """Make the baselines when a part first needs them."""
        if not beside:
            beside.update(baselines(store, sae, _l0(sae, store)))
        return {SAE_ITSELF: sae} | beside

    def part(name: str, key: dict[str, object], measure: Callable[[], Part]) -> Part:
        started = time.monotonic()

        def timed() -> Part:
            found = measure()
            seconds = time.monotonic() - started
            return Part(found.figures, found.curves, found.notes, round(seconds, 1))

        return kept.get(f"{digest[:16]}-{name}", shared | key, timed)

    found = {
        "weights": part("weights", {}, lambda: _weights(dictionaries())),
        "reconstruction": part(
            "reconstruction",
            {"rows": settings.rows},
            lambda: _reconstruction(
                dictionaries(), store, sae, settings.rows, progress("reconstruction")
            ),
        ),
        "downstream": part(
            "downstream",
            {"contexts": settings.contexts},
            lambda: _downstream(
                {name: Splice([one]) for name, one in dictionaries().items()},
                store,
                [sae],
                settings.contexts,
                device,
                progress("downstream loss"),
            ),
        ),
    }
    if table is not None:
        found["compute"] = _compute_equivalent(table, found["downstream"])
    return Evaluation(subject.name, [sae], found)


def evaluate_joint(
    report: Path,
    store: ActivationStore,
    subjects: Sequence[Subject],
    settings: EvaluationSettings,
    device: str,
    progress: Progress,
) -> Evaluation | None:
    """Measure the downstream loss of several SAEs in one forward pass; see `evaluate_parts`.

    Returns:
        The measured part; None unless each of two or more SAEs replaces another site.
    """
    saes = [subject.sae for subject in subjects]
    if len(saes) < 2 or len({replaced_site(sae) for sae in saes}) < len(saes):
        return None
    digests = [sae.digest for sae in saes]
    key = {"store": store.digest, "saes": digests, "contexts": settings.contexts}
    name = xxhash.xxh3_64_hexdigest(" ".join(digests).encode())
    splices = {SAE_ITSELF: Splice(saes)}
    part = Parts(report).get(
        f"{name}-downstream",
        key,
        lambda: _downstream(
            splices, store, saes, settings.contexts, device, progress("loss of all SAEs")
        ),
    )
    found = {"downstream": part}
    if settings.compute_table is not None:
        found["compute"] = _compute_equivalent(ComputeTable.read(settings.compute_table), part)
    return Evaluation(" + ".join(subject.name for subject in subjects), saes, found)


def _l0(sae: SAE, store: ActivationStore) -> float:
    """Return the mean number of active latents on some held-out rows."""
    if sae.config.activation == "topk" and sae.config.k is not None:
        return float(sae.config.k)
    held_out = HeldoutRows.of(store, sae.config, sae.config.rule, L0_ROWS)
    rows = held_out.rows[held_out.part("without outliers")]
    active = [int((sae.encode(x)[1] > 0).sum()) for _, x, _ in batches(store, sae.config, rows)]
    return sum(active) / max(1, len(rows))


def _weights(dictionaries: dict[str, SAE]) -> Part:
    figures = [figure for name, sae in dictionaries.items() for figure in weight_figures(sae, name)]
    return Part(figures)


def _reconstruction(
    dictionaries: dict[str, SAE],
    store: ActivationStore,
    sae: SAE,
    n_rows: int,
    progress: Callable[[int, int], None],
) -> Part:
    rule = sae.config.rule
    held_out = HeldoutRows.of(store, sae.config, rule, n_rows)
    found = reconstruction(dictionaries, store, held_out, progress)
    figures: list[Figure] = []
    curves: list[Curve] = []
    for (name, part), sums in found.items():
        figures.extend(sums.figures(name, part))
        if part == PARTS[0]:
            curves.extend(_curves(name, sums))
    outliers = int(held_out.is_outlier.sum())
    documents = len(np.unique(held_out.cluster))
    notes = [
        f"{len(held_out.rows):,} held-out rows in {documents} clusters of documents. "
        f"{outliers:,} of them are outlier rows (norm above {medians_of(rule):g} medians of their "
        "shard), which training leaves out."
    ]
    return Part(figures, curves, notes)


def _curves(name: str, sums: Reconstruction) -> list[Curve]:
    positions = np.arange(len(sums.per_position))
    shares = np.sort(sums.per_dimension)
    density = np.log10(np.maximum(sums.n_fire / max(1, sums.rows), 1e-12))
    counts, _ = np.histogram(density[sums.n_fire > 0], DENSITY_EDGES)
    middles = (DENSITY_EDGES[1:] + DENSITY_EDGES[:-1]) / 2
    return [
        Curve.of("fvu by position", name, positions, sums.per_position),
        Curve.of("fvu by dimension", name, np.linspace(0, 1, len(shares)), shares),
        Curve.of("density", name, middles, counts),
        Curve.of("l0", name, np.arange(len(sums.l0)), sums.l0 / max(1, sums.rows)),
    ]


def _downstream(
    splices: dict[str, Splice],
    store: ActivationStore,
    saes: Sequence[SAE],
    n_contexts: int,
    device: str,
    progress: Callable[[int, int], None],
) -> Part:
    contexts = heldout_contexts(store, saes, n_contexts)
    dtype: torch.dtype = getattr(torch, store.plan["compute_dtype"])
    model = load_model(model_of(store), dtype, choose_device(device))
    losses = spliced_losses(model, store, splices | controls(store, saes), contexts, progress)
    curves = []
    positions = np.arange(store.context_length - 1)
    for name, loss in losses.items():
        sums = loss.by_position
        delta = (sums[:, CE] - sums[:, CE_MODEL]) / sums[:, TOKENS]
        curves.append(Curve.of("delta_ce by position", name, positions, delta))
        curves.append(Curve.of("kl by position", name, positions, sums[:, KL] / sums[:, TOKENS]))
    replaced = np.mean([replaced_rows(store, sae, contexts) for sae in saes], axis=0)
    notes = [
        f"{len(contexts):,} contexts of {store.context_length} tokens, cut from held-out documents "
        f"only. {replaced.mean():.2%} of their rows are replaced; the SAE's rule leaves the "
        "others unchanged. Contexts have no padding. Position 0 "
        + (
            "is a BOS token in every context."
            if store.plan["bos"] == "context"
            else "is an ordinary token."
        )
        + f" Its row is replaced in {replaced[:, 0].mean():.0%} of the contexts; no loss is "
        "counted for it, since nothing predicts it."
    ]
    return Part(list(downstream_figures(losses)), curves, notes)


def _compute_equivalent(table: ComputeTable, downstream: Part) -> Part:
    """Turn each increase of the loss into a share of pretraining compute."""
    figures = []
    for figure in downstream.figures:
        if figure.metric != "delta_ce" or figure.value is None:
            continue
        low, high = (
            None if limit is None else table.share(limit) for limit in (figure.high, figure.low)
        )
        figures.append(
            Figure(
                "compute_share",
                figure.subject,
                figure.part,
                table.share(figure.value),
                low,
                high,
                figure.count,
                figure.unit,
            )
        )
    return Part(figures, notes=[f"Compute and loss: {table.name}."])
