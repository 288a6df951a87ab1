"""The part of an evaluation that probes latents on labelled texts.

The model reads the packaged texts once for each site, and the SAE encodes them; probes are counted
from these firings:

    REPORT/probes/SITE/store        the activations of the packaged texts
    REPORT/probes/DIGEST/features   the SAE's tables over them
    REPORT/probes/DIGEST/probes.parquet
    REPORT/probes/DIGEST/tasks.parquet      probes of the user's own tasks, in the evaluated store
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import xxhash

from sae_harvest.common.atomic import new_folder, replacing
from sae_harvest.common.errors import InputError
from sae_harvest.harvest.run.config import HarvestConfig
from sae_harvest.harvest.run.driver import Execution, run
from sae_harvest.harvest.text.corpus import CorpusSpec
from sae_harvest.pipelines.evaluate.baselines import RANDOM
from sae_harvest.pipelines.evaluate.probing.probe import ProbeConfig, Probed, probe
from sae_harvest.pipelines.evaluate.probing.tasks import Task, read_tasks
from sae_harvest.pipelines.evaluate.report.inputs import Inputs
from sae_harvest.pipelines.evaluate.report.parts import Part
from sae_harvest.pipelines.features.building.build import build
from sae_harvest.pipelines.features.building.config import FeatureConfig
from sae_harvest.pipelines.features.encoding.sources import SourceSpec, StoreSource
from sae_harvest.store.reader import ActivationStore
from sae_harvest.train.evaluate import sites_of

CORPUS, FOLDER = "probes", "probes"
# Probes need the firings and their number only.
FIRINGS_ONLY = FeatureConfig(n_top=1, n_decile=0, n_random=0, n_inactive=0, n_hard=0)


def probes_part(inputs: Inputs) -> Part:
    """Probe the SAE and its baselines on the packaged tasks, of texts and of tokens."""
    folder = inputs.report / FOLDER
    sites = sites_of(inputs.store, inputs.sae.config)
    inputs.progress("probes: the model reads the texts")(0, 1)
    store = probe_texts(inputs.store, sites, folder / "-".join(sites) / "store", inputs.device)
    own = folder / inputs.digest[:16]

    def built(phase: str, done: int, total: int) -> None:
        inputs.progress(f"probes: {phase}")(done, total)

    build(
        store.place, inputs.path, own / "features", FIRINGS_ONLY, device=inputs.device,
        on_progress=built,
    )  # fmt: skip
    found = _probed(inputs, store, own / "features")
    with replacing(own / "probes.parquet") as temporary:
        pq.write_table(found.table, temporary)
    n_tasks = len(set(found.table["task"].to_pylist()))
    left_out = ", ".join(found.left_out)
    notes = [
        f"{n_tasks} binary tasks on {found.n_rows:,} rows of the packaged texts (--corpus "
        f"{CORPUS}), each latent pooled over a text by its mean."
        + (f" Left out, for too few examples: {left_out}." if left_out else ""),
        f"Every probe, with its latents, is in {FOLDER}/{inputs.digest[:16]}/probes.parquet.",
    ]
    return Part(found.figures, notes=notes)


def probe_texts(
    store: ActivationStore, sites: Sequence[str], place: Path, device: str
) -> ActivationStore:
    """Harvest the packaged texts as a store was harvested, if not done before.

    Args:
        store: the store whose model and settings are used.
        sites: names of the sites.
        place: folder of the new store.
        device: device of the model: cpu, cuda or auto.
    """
    plan = store.plan
    request = HarvestConfig(
        model=plan["model"]["name"],
        model_revision=plan["model"].get("revision"),
        corpus=CorpusSpec(name=CORPUS),
        sites=tuple(sites),
        tokens="all",
        context_length=store.context_length,
        bos=plan["bos"],
        compute_dtype=plan["compute_dtype"],
    )
    run(request, place, Execution(workers=0, device=device))
    return ActivationStore.open(place)


def tasks_digest(inputs: Inputs) -> str:
    """Return the identity of the tasks of `--tasks`."""
    digest = xxhash.xxh3_128()
    for task in _tasks(inputs):
        digest.update(f"{task.name} {task.key}".encode())
        digest.update(task.keys.tobytes())
        digest.update(task.labels.tobytes())
    return digest.hexdigest()


def tasks_part(inputs: Inputs) -> Part:
    """Probe the SAE and its baselines on the tasks of `--tasks`, in the evaluated store.

    Raises:
        InputError: there are no tables, or a task has too few examples in the store.
    """
    if inputs.features is None:
        raise InputError(
            "--tasks are probed in the evaluated store, from stored firings; give the SAE's tables "
            "over it with --features."
        )
    tasks = _tasks(inputs)
    found = _probed(inputs, inputs.store, inputs.features, tasks)
    folder = inputs.report / FOLDER / inputs.digest[:16]
    new_folder(folder.resolve())
    with replacing(folder / "tasks.parquet") as temporary:
        pq.write_table(found.table, temporary)
    figures = [replace(figure, part=f"{figure.part} of --tasks") for figure in found.figures]
    notes = [
        f"{len(tasks)} tasks of {inputs.settings.tasks} on {found.n_rows:,} rows of the evaluated "
        f"store. Every probe is in {FOLDER}/{inputs.digest[:16]}/tasks.parquet."
    ]
    return Part(figures, notes=notes)


def _tasks(inputs: Inputs) -> list[Task]:
    assert inputs.settings.tasks is not None
    return read_tasks(Path(inputs.settings.tasks))


def _probed(
    inputs: Inputs, store: ActivationStore, features: Path, tasks: Sequence[Task] | None = None
) -> Probed:
    """Probe on tasks; None: on the packaged ones."""
    sae = str(inputs.path.resolve())
    source = StoreSource(SourceSpec(store.place, sae, None, None, "cpu"), None)

    def stage(name: str, done: int, total: int) -> None:
        inputs.progress(f"probes: {name}")(done, total)

    random = inputs.dictionaries[RANDOM].to("cpu")
    config = ProbeConfig(packaged=tasks is None)
    return probe(features, source, tasks or [], random, config, stage)
