"""The parts of an evaluation that run the model: downstream loss, compute, ablations."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from transformers import PreTrainedModel

from sae_harvest.harvest.model.models import load_tokenizer
from sae_harvest.pipelines.evaluate.ablation.figures import ablation_figures
from sae_harvest.pipelines.evaluate.ablation.sample import AblationConfig
from sae_harvest.pipelines.evaluate.ablation.sparsity import ablation_effects
from sae_harvest.pipelines.evaluate.baselines import CHANNELS
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
from sae_harvest.pipelines.evaluate.report.inputs import Inputs
from sae_harvest.pipelines.evaluate.report.parts import Curve, Part
from sae_harvest.pipelines.evaluate.splicing import Splice, replaced_rows
from sae_harvest.pipelines.features.tables.texts import TokenTexts
from sae_harvest.store.reader import ActivationStore
from sae_harvest.train.sae.sae import SAE

EFFECTS = "effects"  # folder with a table of effects for each SAE
ABLATED = (SAE_ITSELF, CHANNELS)


def downstream_part(inputs: Inputs) -> Part:
    """Measure the loss of the model with the SAE, its baselines and the controls in place."""
    splices = {name: Splice([one]) for name, one in inputs.dictionaries.items()}
    return spliced_part(
        inputs.model.of(),
        inputs.store,
        splices,
        [inputs.sae],
        inputs.settings.contexts,
        inputs.progress("downstream loss"),
    )


def spliced_part(
    model: PreTrainedModel,
    store: ActivationStore,
    splices: dict[str, Splice],
    saes: Sequence[SAE],
    n_contexts: int,
    progress: Callable[[int, int], None],
) -> Part:
    """Measure splices and the controls of some SAEs on contexts that are held out for all."""
    contexts = heldout_contexts(store, saes, n_contexts)
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


def ablation_part(inputs: Inputs) -> Part:
    """Ablate latents of the SAE, channels and random directions on a sample of firings."""
    store, rows = inputs.store, inputs.settings.ablated_rows
    config = AblationConfig(n_rows=rows)
    effects = ablation_effects(
        store,
        inputs.model.of(torch.float32),  # effects are small differences of logits
        TokenTexts(load_tokenizer(inputs.model.resolved)),
        {name: one for name, one in inputs.dictionaries.items() if name in ABLATED},
        inputs.report / EFFECTS / inputs.digest[:16],
        config,
        inputs.progress("ablations"),
    )
    notes = [
        f"{rows} rows of held-out documents, {config.n_latents} latents that fire on each, and the "
        f"logits of the row and the {config.n_tokens - 1} tokens after it. Every effect is in "
        f"{EFFECTS}/{inputs.digest[:16]}/effects.parquet."
    ]
    return Part(list(ablation_figures(effects, store)), notes=notes)


def compute_part(table: ComputeTable, downstream: Part) -> Part:
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
