"""The probe loss of all latents and tasks, from stored firings, against the feature pass.

The budget is 61 tasks and 4,608 latents over 262,144 rows. The tasks are the packaged ones of
tokens, and tasks of documents with labels at random, which take as long as any others.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from time import perf_counter

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from bench.feature_pass import SITE, SMALL, WIDTH, random_sae
from bench.inputs import gpt2_model, write_long_news
from bench.measurement import Measurement
from sae_harvest.common.console import output
from sae_harvest.harvest.model.models import load_tokenizer
from sae_harvest.harvest.run.config import HarvestConfig
from sae_harvest.harvest.run.driver import Execution, run
from sae_harvest.harvest.text.corpus import CorpusSpec
from sae_harvest.harvest.tokens.encoding import end_of_text_id
from sae_harvest.pipelines.evaluate.probing.examples import (
    document_examples,
    row_examples,
    store_rows,
)
from sae_harvest.pipelines.evaluate.probing.pooling import StoredFirings
from sae_harvest.pipelines.evaluate.probing.probe import labels_of_tokens
from sae_harvest.pipelines.evaluate.probing.survey import Labelling, fit_best
from sae_harvest.pipelines.evaluate.probing.tasks import Task
from sae_harvest.pipelines.evaluate.probing.token_tasks import TOKEN_TASKS
from sae_harvest.pipelines.features.building.build import build
from sae_harvest.pipelines.features.building.config import FeatureConfig
from sae_harvest.pipelines.features.encoding.firings import Blocks
from sae_harvest.pipelines.features.encoding.sources import SourceSpec, StoreSource
from sae_harvest.pipelines.features.tables.texts import TokenTexts
from sae_harvest.store.reader import ActivationStore

N_LATENTS, N_TASKS = 4608, 61


def measure(folder: Path) -> list[Measurement]:
    """probe_loss, on a store made in `folder`."""
    model = gpt2_model(folder / "one-block", n_layer=1, n_embd=WIDTH, n_head=12)
    corpus = folder / "corpus.jsonl"
    write_long_news(corpus, SMALL)
    config = HarvestConfig(
        model=str(model), corpus=CorpusSpec(name=str(corpus)), sites=(SITE,), tokens=SMALL
    )
    store, sae, out = folder / "probed", folder / "random-sae", folder / "features"
    run(config, store, Execution(workers=0))
    random_sae(ActivationStore.open(store), N_LATENTS).save(sae)
    built = build(store, sae, out, FeatureConfig())
    source = StoreSource(SourceSpec(str(store), str(sae), None, None, "cpu"), None)
    once(source, out)  # loads compiled code
    start = perf_counter()
    n_tasks = once(source, out)
    taken = perf_counter() - start
    for path in (store, sae, out):
        shutil.rmtree(path)
    assert built.seconds is not None
    output().print(
        f"{n_tasks} tasks, {N_LATENTS:,} latents, {SMALL:,} rows: probe loss {taken:.1f} s, the "
        f"pass that made the firings {built.seconds:.1f} s"
    )
    return [Measurement("probe_loss", taken, built.seconds, "s", 0.5, 1.0, higher_is_better=False)]


def once(source: StoreSource, features: Path) -> int:
    """Fit all latents to all tasks; return the number of tasks."""
    tokenizer = load_tokenizer(source.model)
    rows = store_rows(source, end_of_text_id(tokenizer), SMALL)
    labels = labels_of_tokens(source, rows, TokenTexts(tokenizer))
    n_fire = pq.read_table(features / "latents.parquet", columns=["n_fire"])["n_fire"].to_numpy()
    firings = StoredFirings(Blocks(features, len(rows), source.block_rows, N_LATENTS), n_fire)
    documents = pa.concat_tables(
        [source.store.documents(shard) for shard in range(source.store.n_shards)]
    )["document"].to_numpy()
    of_rows, _ = row_examples(rows, labels, TOKEN_TASKS, [], source.place)
    rng = np.random.default_rng(0)
    tasks = [
        Task(f"random {number}", "document", documents, rng.random(len(documents)) < 0.5)
        for number in range(N_TASKS - len(of_rows.names))
    ]
    of_documents, _ = document_examples(rows, tasks, source.place)
    for examples in (of_documents, of_rows):
        fit_best(firings, examples, "mean", [Labelling.unweighted(examples.codes)], 1)
    return len(of_documents.names) + len(of_rows.names)
