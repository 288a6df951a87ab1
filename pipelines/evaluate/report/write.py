"""The files of a report: `metrics.parquet`, the page, and SAEBench's JSON, made from its parts."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from sae_harvest.common.atomic import new_folder, replacing, write_text
from sae_harvest.common.device import choose_device
from sae_harvest.common.errors import InputError
from sae_harvest.common.paths import shown
from sae_harvest.pipelines.evaluate.figures import figures_table
from sae_harvest.pipelines.evaluate.report.definitions import DEFINITIONS
from sae_harvest.pipelines.evaluate.report.inputs import Inputs, Progress, StoreModel
from sae_harvest.pipelines.evaluate.report.measure import (
    Evaluation,
    evaluate_joint,
    evaluate_parts,
)
from sae_harvest.pipelines.evaluate.report.of_tables import features_of, require_used
from sae_harvest.pipelines.evaluate.report.page import page
from sae_harvest.pipelines.evaluate.report.saebench import saebench_core
from sae_harvest.pipelines.evaluate.report.settings import EvaluationSettings
from sae_harvest.store.reader import ActivationStore
from sae_harvest.train.run.files import write_json
from sae_harvest.train.sae.sae import SAE

TABLE, PAGE, SAEBENCH = "metrics.parquet", "report.html", "saebench"
ROW_GROUP = 1 << 14


def write_report(
    report: Path,
    store_place: str,
    sae_paths: Sequence[Path],
    features: Sequence[Path],
    settings: EvaluationSettings,
    device: str,
    progress: Progress,
    command: str,
) -> list[Evaluation]:
    """Evaluate SAEs, then write their table and their page.

    Parts that are measured already are not measured again, so that a killed evaluation continues.

    Args:
        report: folder of the report, made if missing.
        store_place: folder or bucket address of the store.
        sae_paths: folders of SAEs, each trained on a site of the store.
        features: folders of feature tables of these SAEs over the store; an SAE without tables
            gets no programs.
        settings: sample sizes.
        device: device of model and SAEs: cpu, cuda or auto.
        progress: given the name of a part, returns a function of things done and to do.
        command: the command, written into the table and the page.

    Returns:
        The measured parts of each SAE, in order; then, if each replaces another site, those of all
        SAEs in one forward pass.

    Raises:
        RunError: a folder of tables belongs to none of the SAEs.
        InputError: an SAE is given twice, nothing is held out, or the device is missing.
        SaeHarvestError: store, SAE or model cannot be read, or do not fit together.
    """
    device = choose_device(device)
    names = [shown(path) for path in sae_paths]
    if len(set(names)) < len(names):
        raise InputError("An SAE is given twice; give each folder once.")
    new_folder(report.resolve())
    store = ActivationStore.open(store_place)
    saes = [SAE.load(path, device) for path in sae_paths]
    tables = [features_of(features, sae.digest, store.digest) for sae in saes]
    require_used(features, tables)
    model = StoreModel(store, device)
    several = [
        Inputs(report, store, name, path, sae, table, settings, device, model, progress)
        for name, path, sae, table in zip(names, sae_paths, saes, tables, strict=True)
    ]
    found = [evaluate_parts(inputs) for inputs in several]
    joint = evaluate_joint(several)
    found += [] if joint is None else [joint]
    _write_table(report / TABLE, found, command)
    new_folder(report.resolve() / SAEBENCH)
    for one in found[: len(several)]:
        if "downstream" not in one.parts:  # a synthetic store has no model
            continue
        content = saebench_core(one, store, int(1000 * time.time()))
        write_json(report / SAEBENCH / f"{one.saes[0].digest[:16]}_core.json", content)
    title = f"Evaluation of {', '.join(names) if len(names) < 4 else f'{len(names)} SAEs'}"
    write_text(report / PAGE, page(found, title, command))
    return found


def _write_table(path: Path, evaluations: Sequence[Evaluation], command: str) -> None:
    """Write a row for each figure, with its SAE, its definition and the command."""
    tables = []
    for evaluation in evaluations:
        figures = [figure for part in evaluation.parts.values() for figure in part.figures]
        table = figures_table(figures)
        n = table.num_rows
        known = (DEFINITIONS.get(figure.metric) for figure in figures)
        columns: dict[str, list[str | None]] = {
            "sae": [evaluation.name] * n,
            "sae_digest": [" ".join(sae.digest for sae in evaluation.saes)] * n,
            "definition": [None if one is None else one.meaning for one in known],
            "command": [command] * n,
        }
        for name, values in columns.items():
            place = 0 if name == "sae" else table.num_columns
            table = table.add_column(place, pa.field(name, pa.string()), pa.array(values, "string"))
        tables.append(table)
    with replacing(path) as temporary:
        pq.write_table(pa.concat_tables(tables), temporary, row_group_size=ROW_GROUP)
