"""All parts of an SAE's evaluation: what is measured, and what each part depends on."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import xxhash

from sae_harvest.common.errors import InputError
from sae_harvest.pipelines.evaluate.compute_equivalent import ComputeTable
from sae_harvest.pipelines.evaluate.figures import SAE_ITSELF
from sae_harvest.pipelines.evaluate.report.inputs import Inputs
from sae_harvest.pipelines.evaluate.report.of_model import (
    ablation_part,
    compute_part,
    downstream_part,
    spliced_part,
)
from sae_harvest.pipelines.evaluate.report.of_probes import (
    probes_part,
    tasks_digest,
    tasks_part,
)
from sae_harvest.pipelines.evaluate.report.of_rows import reconstruction_part, weights_part
from sae_harvest.pipelines.evaluate.report.of_tables import programs_part
from sae_harvest.pipelines.evaluate.report.of_truth import is_synthetic, recovery_part
from sae_harvest.pipelines.evaluate.report.parts import Part, Parts
from sae_harvest.pipelines.evaluate.splicing import Splice, replaced_site
from sae_harvest.pipelines.features.encoding.dictionary import sae_fits
from sae_harvest.train.sae.sae import SAE


@dataclass(frozen=True, eq=False)
class Evaluation:
    """The measured parts of one SAE, by name."""

    name: str
    """Name of the SAE in the report."""

    saes: Sequence[SAE]
    """The SAE; or several SAEs that were evaluated in one forward pass."""

    parts: dict[str, Part]
    """Name of the part → the part."""


def _with_model(inputs: Inputs) -> bool:
    return not is_synthetic(inputs)


def _with_probes(inputs: Inputs) -> bool:
    return inputs.settings.probes and not is_synthetic(inputs)


def _with_features(inputs: Inputs) -> bool:
    return inputs.features is not None


def _with_tasks(inputs: Inputs) -> bool:
    return inputs.settings.tasks is not None


@dataclass(frozen=True)
class _Measure:
    """One part of an evaluation."""

    name: str
    settings: tuple[str, ...]
    """Settings that it depends on, beside store and SAE."""
    measure: Callable[[Inputs], Part]
    wanted: Callable[[Inputs], bool] = lambda inputs: True
    """True if an evaluation has the part."""
    files: Callable[[Inputs], str] = lambda inputs: ""
    """Identity of other files that it depends on."""


MEASURES = (
    _Measure("weights", (), weights_part),
    _Measure("reconstruction", ("rows",), reconstruction_part),
    _Measure("recovery", ("rows",), recovery_part, is_synthetic),
    _Measure("downstream", ("contexts",), downstream_part, _with_model),
    _Measure("ablation", ("ablated_rows",), ablation_part, _with_model),
    _Measure("probes", (), probes_part, _with_probes),
    _Measure("tasks", (), tasks_part, _with_tasks, tasks_digest),
    _Measure("programs", ("n2g_latents",), programs_part, _with_features),
)


def evaluate_parts(inputs: Inputs) -> Evaluation:
    """Measure every part of an SAE's evaluation, or take it from the report's folder.

    Raises:
        RunError: SAE and store do not fit, or a file of the report is damaged.
        InputError: nothing is held out, or a task or the table of compute cannot be used.
    """
    sae_fits(inputs.store, inputs.sae, inputs.path)
    table = _compute_table(inputs)
    if table is not None and is_synthetic(inputs):
        raise InputError(
            f"{inputs.store.place} is synthetic, so there is no model whose loss could be compared "
            "with --compute-table; leave it out."
        )
    kept = Parts(inputs.report)
    found: dict[str, Part] = {}
    for one in MEASURES:
        if not one.wanted(inputs):
            continue
        key = {"store": inputs.store.digest, "sae": inputs.digest}
        key |= {name: getattr(inputs.settings, name) for name in one.settings}
        if files := one.files(inputs):
            key["files"] = files
        name = f"{inputs.digest[:16]}-{one.name}"
        found[one.name] = kept.get(name, key, partial(_timed, one.measure, inputs))
    if table is not None:
        found["compute"] = compute_part(table, found["downstream"])
    return Evaluation(inputs.name, [inputs.sae], found)


def evaluate_joint(several: Sequence[Inputs]) -> Evaluation | None:
    """Measure the downstream loss of several SAEs in one forward pass; see `evaluate_parts`.

    Args:
        several: inputs of each SAE, with the same store and settings.

    Returns:
        The measured part; None unless each of two or more SAEs replaces another site.
    """
    saes = [inputs.sae for inputs in several]
    if len(saes) < 2 or len({replaced_site(sae) for sae in saes}) < len(saes):
        return None
    first, digests = several[0], [inputs.digest for inputs in several]
    key = {"store": first.store.digest, "saes": digests, "contexts": first.settings.contexts}
    name = xxhash.xxh3_64_hexdigest(" ".join(digests).encode())

    def measure(inputs: Inputs) -> Part:
        splices, progress = {SAE_ITSELF: Splice(saes)}, inputs.progress("loss of all SAEs")
        contexts = inputs.settings.contexts
        return spliced_part(inputs.model.of(), inputs.store, splices, saes, contexts, progress)

    part = Parts(first.report).get(f"{name}-downstream", key, lambda: _timed(measure, first))
    found = {"downstream": part}
    if (table := _compute_table(first)) is not None:
        found["compute"] = compute_part(table, part)
    return Evaluation(" + ".join(inputs.name for inputs in several), saes, found)


def _compute_table(inputs: Inputs) -> ComputeTable | None:
    name = inputs.settings.compute_table
    return None if name is None else ComputeTable.read(name)


def _timed(measure: Callable[[Inputs], Part], inputs: Inputs) -> Part:
    """Measure a part and note the seconds that it took."""
    started = time.monotonic()
    part = measure(inputs)
    return replace(part, seconds=round(time.monotonic() - started, 1))
