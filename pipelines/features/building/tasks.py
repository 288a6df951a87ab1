"""The description of a build that every worker gets, and the tasks that workers do."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from threading import Event, Lock

import pyarrow as pa

from sae_harvest.common.errors import RunError
from sae_harvest.harvest.model.models import load_tokenizer
from sae_harvest.pipelines.features.building.config import FeatureConfig
from sae_harvest.pipelines.features.counting.neighbours import Neighbours, neighbours
from sae_harvest.pipelines.features.counting.profile import Profile, profile
from sae_harvest.pipelines.features.encoding.firings import Blocks, publish
from sae_harvest.pipelines.features.encoding.sources import Source, SourceSpec, open_source
from sae_harvest.pipelines.features.tables.contexts import WantedContexts, contexts
from sae_harvest.pipelines.features.tables.rows import Rows
from sae_harvest.pipelines.features.tables.texts import TokenTexts
from sae_harvest.store.objects import LocalObjects


@dataclass(frozen=True)
class Job:
    """A build, in a form that can be sent to a worker."""

    given: SourceSpec
    """Source of the firings."""
    source_digest: str
    """Digest of the store at the start of the build."""
    dictionary_digest: str
    """Digest of the SAE or the neurons."""
    out: str
    """Folder of the tables, an absolute path."""
    config: FeatureConfig
    """Settings of the tables."""


class Work:
    """Data that the tasks of a job share in one process."""

    def __init__(self, job: Job, source: Source) -> None:
        self.job, self.source = job, source
        self.out, self.dictionary = Path(job.out), source.dictionary
        n_latents = self.dictionary.n_latents
        self.blocks = Blocks(self.out, source.n_rows, source.block_rows, n_latents)

    @cached_property
    def rows(self) -> Rows:
        return Rows(self.out)

    @cached_property
    def texts(self) -> TokenTexts:
        return TokenTexts(load_tokenizer(self.source.model))


_opening, _held = Lock(), list[Work]()  # at most one, because it is large


def work_of(job: Job) -> Work:
    """Return this process's work of the job; the first call opens it.

    Raises:
        RunError: the store or the SAE has changed since the job began.
    """
    with _opening:
        if not _held or _held[0].job != job:
            source = open_source(job.given, job.source_digest)
            if source.dictionary.digest != job.dictionary_digest:
                raise RunError(f"The SAE in {job.given.sae} has changed; build again.")
            _held[:] = [Work(job, source)]
        return _held[0]


@contextmanager
def held(work: Work) -> Iterator[None]:
    """Use this as the process's work of its job, while the block runs."""
    _held[:] = [work]
    try:
        yield
    finally:
        _held.clear()


def encode_block(stopped: Event, job: Job, block: int) -> None:
    """Encode a block and publish its firings."""
    work = work_of(job)
    found = work.source.firings(*work.blocks.span(block), job.config.batch_rows, stopped)
    publish(LocalObjects(work.out), block, found)


def profile_latents(job: Job, first: int, last: int) -> Profile:
    """Call `profile`."""
    work = work_of(job)
    length = work.source.context_length
    return profile(work.blocks, work.rows, length, job.config, first, last)


def neighbours_of_latents(job: Job, share: float, first: int, last: int) -> Neighbours:
    """Call `neighbours`."""
    work = work_of(job)
    length, n = work.source.context_length, job.config.n_neighbours
    return neighbours(work.blocks, length, work.dictionary.W_dec, n, share, first, last)


def contexts_of_latents(job: Job, wanted: WantedContexts, first: int, last: int) -> pa.Table:
    """Call `contexts`."""
    work = work_of(job)
    length, config = work.source.context_length, job.config
    return contexts(work.blocks, work.rows, length, config, work.texts, wanted, first, last)
