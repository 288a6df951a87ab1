"""The part of an evaluation that probes latents on labelled texts.

The model reads the packaged texts once for each site, and the SAE encodes them; probes are counted
from these firings:

    REPORT/probes/SITE/store        the activations of the packaged texts
    REPORT/probes/DIGEST/features   the SAE's tables over them
    REPORT/probes/DIGEST/probes.parquet
"""

from __future__ import annotations

from pathlib import Path

import pyarrow.parquet as pq

from sae_harvest.common.atomic import replacing
from sae_harvest.harvest.run.config import HarvestConfig
from sae_harvest.harvest.run.driver import Execution, run
from sae_harvest.harvest.text.corpus import CorpusSpec
from sae_harvest.pipelines.evaluate.baselines import RANDOM
from sae_harvest.pipelines.evaluate.probing.probe import ProbeConfig, Probed, probe
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
    store = _store_of_texts(inputs, folder / "-".join(sites_of(inputs.store, inputs.sae.config)))
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


def _store_of_texts(inputs: Inputs, place: Path) -> ActivationStore:
    """Harvest the packaged texts as the evaluated store was harvested, if not done before."""
    plan = inputs.store.plan
    request = HarvestConfig(
        model=plan["model"]["name"],
        model_revision=plan["model"].get("revision"),
        corpus=CorpusSpec(name=CORPUS),
        sites=tuple(sites_of(inputs.store, inputs.sae.config)),
        tokens="all",
        context_length=inputs.store.context_length,
        bos=plan["bos"],
        compute_dtype=plan["compute_dtype"],
    )
    inputs.progress("probes: the model reads the texts")(0, 1)
    run(request, place / "store", Execution(workers=0, device=inputs.device))
    return ActivationStore.open(place / "store")


def _probed(inputs: Inputs, store: ActivationStore, features: Path) -> Probed:
    """Probe on the packaged tasks."""
    sae = str(inputs.path.resolve())
    source = StoreSource(SourceSpec(store.place, sae, None, None, "cpu"), None)

    def stage(name: str, done: int, total: int) -> None:
        inputs.progress(f"probes: {name}")(done, total)

    random = inputs.dictionaries[RANDOM].to("cpu")
    return probe(features, source, [], random, ProbeConfig(), stage)
