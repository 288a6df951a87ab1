"""Probe loss and k-sparse probing of an SAE, from its stored firings.

Gao et al. (2024), section 4.2: for each binary task the latent, weight and bias with the lowest
cross-entropy are found, and the losses are averaged over tasks. The paper takes the minimum on the
same examples (`probe_loss`); here the latent is also chosen on training documents and scored on
other documents (`probe_loss_test`). Values of latents are those after the activation function,
since these are stored.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Event

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict, Field

from sae_harvest.harvest.model.models import load_tokenizer
from sae_harvest.harvest.tokens.encoding import end_of_text_id
from sae_harvest.pipelines.evaluate.baselines import RANDOM
from sae_harvest.pipelines.evaluate.figures import SAE_ITSELF, Figure
from sae_harvest.pipelines.evaluate.probing.examples import (
    ROWS,
    Examples,
    StoreRows,
    document_examples,
    require_all,
    row_examples,
    store_rows,
)
from sae_harvest.pipelines.evaluate.probing.measure import Progress, Settings, measure
from sae_harvest.pipelines.evaluate.probing.pooling import (
    Pooling,
    StoredFirings,
    pooled_channels,
    row_channels,
)
from sae_harvest.pipelines.evaluate.probing.summary import figures_of, rows_of
from sae_harvest.pipelines.evaluate.probing.table import probes_table
from sae_harvest.pipelines.evaluate.probing.tasks import Task
from sae_harvest.pipelines.evaluate.probing.text_tasks import text_tasks
from sae_harvest.pipelines.evaluate.probing.token_tasks import TOKEN_TASKS, token_labels
from sae_harvest.pipelines.features.encoding.firings import Blocks, publish
from sae_harvest.pipelines.features.encoding.sources import SourceSpec, StoreSource
from sae_harvest.pipelines.features.tables.texts import TokenTexts
from sae_harvest.store.objects import LocalObjects
from sae_harvest.train.sae.sae import SAE

CONTEXTS = 2048  # whose tokens are labelled at once
BATCH_ROWS = 1024  # encoded at once


class ProbeConfig(BaseModel):
    """Settings of probes.

    >>> ProbeConfig().pooling
    'mean'
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    pooling: Pooling = Field(
        "mean", description="how values of a document's rows become one: last, mean or maximum"
    )
    most_rows: int = Field(1 << 20, ge=1, description="rows of the store that are read, at most")
    n_best: int = Field(10, ge=1, le=1000, description="latents of each task that are listed")
    packaged: bool = Field(True, description="whether to add the packaged tasks")
    seed: int = Field(0, ge=0, description="seed of drawn examples and shuffled labels")


@dataclass(frozen=True, eq=False)
class Probed:
    """The result of probing."""

    figures: list[Figure]
    """Means over tasks, of the SAE and of the baselines."""
    table: pa.Table
    """The probes; see `table.SCHEMA`."""
    n_rows: int
    """Rows of the store that were read."""
    left_out: dict[str, str]
    """Packaged tasks that the store has too few examples of, each with the reason."""


def probe(
    features: Path,
    source: StoreSource,
    tasks: Sequence[Task],
    random: SAE | None,
    config: ProbeConfig,
    progress: Progress = lambda stage, done, total: None,
) -> Probed:
    """Probe the latents of an SAE, or neurons, on binary tasks.

    Args:
        features: folder of their tables; firings and the table of latents are read.
        source: the store and the dictionary that the tables were made from.
        tasks: tasks beside the packaged ones.
        random: the random baseline of the SAE, which encodes all rows; None for neurons.
        config: settings.
        progress: called with a stage, the amount done, the amount in all.

    Raises:
        InputError: a task of `tasks` has no, or too few, examples in the store; the model's
            tokenizer or the packaged texts are missing.
        RunError: a file of firings is missing or damaged.
        DamagedError: an object of the store is missing or damaged.
    """
    tokenizer = load_tokenizer(source.model)
    rows = store_rows(source, end_of_text_id(tokenizer), config.most_rows)
    found, left_out = find_examples(source, rows, TokenTexts(tokenizer), tasks, config)
    n_fire = pq.read_table(features / "latents.parquet", columns=["n_fire"])["n_fire"].to_numpy()
    n_latents = source.dictionary.n_latents
    firings = {
        SAE_ITSELF: StoredFirings(Blocks(features, len(rows), source.block_rows, n_latents), n_fire)
    }
    settings = Settings(config.pooling, config.n_best, config.seed)
    measured = []
    with tempfile.TemporaryDirectory(prefix="probes-") as scratch:
        if random is not None:
            firings[RANDOM] = encoded(source, random, len(rows), Path(scratch), progress)
        for examples in found:

            def channels(
                numbers: npt.NDArray[np.int64], examples: Examples = examples
            ) -> npt.NDArray[np.float32]:
                if examples.unit == ROWS:
                    return row_channels(source.store, source.dictionary.site, numbers)
                given = source.store, source.dictionary.site, examples, config.pooling
                return pooled_channels(*given)[numbers]

            measured.append(measure(examples, firings, channels, settings, progress))
    table = probes_table(row for m in measured for row in rows_of(m, config.pooling))
    return Probed(list(figures_of(measured)), table, len(rows), left_out)


def find_examples(
    source: StoreSource,
    rows: StoreRows,
    texts: TokenTexts,
    tasks: Sequence[Task],
    config: ProbeConfig,
) -> tuple[list[Examples], dict[str, str]]:
    """Find the examples of all tasks; return those of documents and of rows that there are."""
    of_texts, names, labels = list[Task](), tuple[str, ...](), np.empty((len(rows), 0), np.bool_)
    if config.packaged:
        of_texts, names = text_tasks(), TOKEN_TASKS
        labels = labels_of_tokens(source, rows, texts)
    by_text = [task for task in tasks if task.key != "row"]
    by_row = [task for task in tasks if task.key == "row"]
    documents, missing = document_examples(rows, [*of_texts, *by_text], source.place)
    tokens, also_missing = row_examples(rows, labels, names, by_row, source.place)
    left_out = missing | also_missing
    require_all(tasks, left_out)
    return [found for found in (documents, tokens) if found.names], left_out


def labels_of_tokens(
    source: StoreSource, rows: StoreRows, texts: TokenTexts
) -> npt.NDArray[np.bool_]:
    """Label all rows for the packaged tasks of tokens, bool [rows, tasks]."""
    labels = np.empty((len(rows), len(TOKEN_TASKS)), np.bool_)
    step = CONTEXTS * source.context_length
    for first in range(0, len(rows), step):
        here, shape = slice(first, first + step), (-1, source.context_length)
        contexts = rows.token[here].reshape(shape), rows.number[here].reshape(shape)
        labels[here] = token_labels(*contexts, texts)
    return labels


def encoded(
    source: StoreSource, sae: SAE, n_rows: int, scratch: Path, progress: Progress
) -> StoredFirings:
    """Encode the first rows of a store by another SAE, into files in an empty folder."""
    sae.save(scratch / "sae")
    spec = SourceSpec(source.place, str(scratch / "sae"), source.dictionary.site, None, "cpu")
    other = StoreSource(spec, source.digest)
    n_latents = sae.config.n_latents
    blocks = Blocks(scratch, n_rows, other.block_rows, n_latents)
    n_fire, objects = np.zeros(n_latents, np.int64), LocalObjects(scratch)
    for block in range(len(blocks)):
        part = other.firings(*blocks.span(block), BATCH_ROWS, Event())
        n_fire += np.diff(part.starts)
        publish(objects, block, part)
        progress(f"encoding by {RANDOM} directions", block + 1, len(blocks))
    return StoredFirings(blocks, n_fire)
