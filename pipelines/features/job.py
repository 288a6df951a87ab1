"""What every worker of a build needs to know, and the pieces of work it does."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path

import numpy as np
import pyarrow as pa

from harvest.models import load_tokenizer
from pipelines.features.config import FeatureConfig
from pipelines.features.contexts import Wanted, contexts
from pipelines.features.dictionary import Dictionary, load_dictionary
from pipelines.features.encode import encode
from pipelines.features.firings import Blocks, publish
from pipelines.features.neighbours import Neighbours, neighbours
from pipelines.features.profile import Profile, profile
from pipelines.features.rows import Rows
from pipelines.features.texts import TokenTexts
from pipelines.source import model_of
from store.errors import RunError
from store.objects import LocalObjects
from store.reader import ActivationStore
from store.rules import RowRule


@dataclass(frozen=True)
class Job:
    """A build, in a form that travels to a worker.

    store, sae, out: places, as absolute paths, or `identity`; store_digest: of the store as it was
    when the build began; site; rule: which rows are read; block_rows: see `features.firings`.
    """

    store: str
    store_digest: str
    sae: str
    sae_digest: str
    out: str
    site: str
    rule: RowRule
    config: FeatureConfig
    n_latents: int
    block_rows: int
    device: str


class Work:
    """What the pieces of work share, opened when first needed."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.out = Path(job.out)

    @cached_property
    def store(self) -> ActivationStore:
        return ActivationStore.open(self.job.store, self.job.store_digest)

    @cached_property
    def dictionary(self) -> Dictionary:
        found = load_dictionary(self.store, self.job.sae, self.job.site, self.job.device)
        if found.digest != self.job.sae_digest:
            raise RunError(f"The SAE in {self.job.sae} has changed; build again.")
        return found

    @cached_property
    def blocks(self) -> Blocks:
        return Blocks(self.out, self.store.n_rows, self.job.block_rows, self.job.n_latents)

    @cached_property
    def rows(self) -> Rows:
        return Rows(self.out)

    @cached_property
    def texts(self) -> TokenTexts:
        return TokenTexts(load_tokenizer(model_of(self.store)))


@lru_cache(maxsize=1)
def work_of(job: Job) -> Work:
    """The one of this process."""
    return Work(job)


def encode_block(job: Job, block: int) -> int:
    """Encode a block and publish its firings; the number of rows read."""
    work = work_of(job)
    first, last = work.blocks.span(block)
    x = work.store.read(job.site, first, last)
    selected = work.rows.read(np.arange(first, last))
    firings = encode(
        work.dictionary.encoder, job.n_latents, x, selected, first, job.config.batch_rows
    )
    publish(LocalObjects(work.out), block, firings)
    return int(selected.sum())


def profile_latents(job: Job, first: int, last: int) -> Profile:
    """See `profile`."""
    work = work_of(job)
    length = work.store.context_length
    return profile(work.blocks, work.rows, length, job.config, first, last)


def neighbours_of_latents(job: Job, share: float, first: int, last: int) -> Neighbours:
    """See `neighbours`."""
    work = work_of(job)
    length, n = work.store.context_length, job.config.n_neighbours
    return neighbours(work.blocks, length, work.dictionary.W_dec, n, share, first, last)


def contexts_of_latents(job: Job, wanted: Wanted, first: int, last: int) -> pa.Table:
    """See `contexts`."""
    work = work_of(job)
    length, config = work.store.context_length, job.config
    return contexts(work.blocks, work.rows, length, config, work.texts, wanted, first, last)
