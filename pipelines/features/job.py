"""What every worker of a build needs to know, and the pieces of work it does."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path

import pyarrow as pa

from harvest.models import load_tokenizer
from pipelines.features.aside import aside
from pipelines.features.config import FeatureConfig
from pipelines.features.contexts import Wanted, contexts
from pipelines.features.dictionary import Dictionary
from pipelines.features.firings import Blocks, Firings, publish
from pipelines.features.neighbours import Neighbours, neighbours
from pipelines.features.profile import Profile, profile
from pipelines.features.rows import Rows
from pipelines.features.sources import Given, Source, open_source
from pipelines.features.texts import TokenTexts
from store.errors import RunError
from store.objects import LocalObjects


@dataclass(frozen=True)
class Job:
    """A build, in a form that travels to a worker.

    source_digest: of the store as it was when the build began; out: an absolute path.
    """

    given: Given
    source_digest: str
    dictionary_digest: str
    out: str
    config: FeatureConfig


class Work:
    """What the pieces of work share, opened when first needed."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.out = Path(job.out)

    @cached_property
    def source(self) -> Source:
        found = open_source(self.job.given, self.job.source_digest)
        if found.dictionary.digest != self.job.dictionary_digest:
            raise RunError(f"The SAE in {self.job.given.sae} has changed; build again.")
        return found

    @property
    def dictionary(self) -> Dictionary:
        return self.source.dictionary

    @cached_property
    def blocks(self) -> Blocks:
        n_latents = self.dictionary.n_latents
        return Blocks(self.out, self.source.n_rows, self.source.block_rows, n_latents)

    @cached_property
    def rows(self) -> Rows:
        return Rows(self.out)

    @cached_property
    def texts(self) -> TokenTexts:
        return TokenTexts(load_tokenizer(self.source.model))


@lru_cache(maxsize=1)
def work_of(job: Job) -> Work:
    """The one of this process."""
    return Work(job)


def encode_blocks(job: Job, blocks: list[int]) -> int:
    """Encode blocks, and publish the firings of each while the next one is encoded; how many."""
    work = work_of(job)
    spans = [work.blocks.span(block) for block in blocks]

    def write(block: int, firings: Callable[[], Firings]) -> None:
        publish(LocalObjects(work.out), block, firings())

    found = work.source.firings(spans, job.config.batch_rows)
    with closing(found), aside() as call:
        for block, firings in zip(blocks, found, strict=True):
            call(write, block, firings)
    return len(blocks)


def profile_latents(job: Job, first: int, last: int) -> Profile:
    """See `profile`."""
    work = work_of(job)
    length = work.source.context_length
    return profile(work.blocks, work.rows, length, job.config, first, last)


def neighbours_of_latents(job: Job, share: float, first: int, last: int) -> Neighbours:
    """See `neighbours`."""
    work = work_of(job)
    length, n = work.source.context_length, job.config.n_neighbours
    return neighbours(work.blocks, length, work.dictionary.W_dec, n, share, first, last)


def contexts_of_latents(job: Job, wanted: Wanted, first: int, last: int) -> pa.Table:
    """See `contexts`."""
    work = work_of(job)
    length, config = work.source.context_length, job.config
    return contexts(work.blocks, work.rows, length, config, work.texts, wanted, first, last)
