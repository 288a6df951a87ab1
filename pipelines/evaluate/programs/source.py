"""The data that programs are learnt from: rows of a store, and firings of a dictionary on them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from threading import Event

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq

from sae_harvest.common.errors import InputError, RunError
from sae_harvest.pipelines.evaluate.programs.firings import SplitFirings, split_firings
from sae_harvest.pipelines.evaluate.programs.suffixes import Suffixes, TokenRows
from sae_harvest.pipelines.features.encoding.dictionary import ACTIVE
from sae_harvest.pipelines.features.encoding.firings import Blocks, block_rows, publish
from sae_harvest.pipelines.features.encoding.sources import SourceSpec, StoreSource
from sae_harvest.pipelines.features.tables.checks import require_tables
from sae_harvest.pipelines.features.tables.folder import DELPHI, IDENTITY, firing_files
from sae_harvest.pipelines.features.tables.rows import RowsPart
from sae_harvest.pipelines.source import Locations, sae_of, store_of
from sae_harvest.store.objects import LocalObjects
from sae_harvest.store.reader import ActivationStore
from sae_harvest.store.rules import RowRule
from sae_harvest.train.sae.sae import SAE

BATCH_ROWS = 4096  # rows encoded at a time


@dataclass(frozen=True, eq=False)
class ProgramSource:
    """Rows and firings of one dictionary."""

    suffixes: Suffixes
    """Patterns of the store's rows."""
    blocks: Blocks
    """The firings."""
    fires: npt.NDArray[np.bool_]
    """Mask of the latents that fire on any row [latents]."""

    @property
    def rows(self) -> TokenRows:
        """The rows."""
        return self.suffixes.rows

    def firings(self, latent: int) -> tuple[SplitFirings, SplitFirings]:
        """Return the firings of one latent on training rows, and on held-out rows."""
        return self._firings(latent)

    @cached_property
    def _firings(self) -> Callable[[int], tuple[SplitFirings, SplitFirings]]:
        return cache(lambda latent: split_firings(self.rows, self.blocks, latent, latent + 1))


@dataclass(frozen=True, eq=False)
class TablesSource:
    """Store and SAE of feature tables."""

    store: ActivationStore
    """The store."""
    sae: SAE | None
    """The SAE; None if the latents are neurons."""
    own: ProgramSource
    """Rows, and the firings in the tables."""
    l0: float
    """Mean number of latents that fire on a row."""

    @classmethod
    def open(cls, features: Path, moved: Locations) -> TablesSource:
        """Find what the tables in a folder were made from.

        Raises:
            RunError: there are no tables, or they are damaged, or their store or SAE is missing.
            InputError: they were made from a cache of delphi.
        """
        run = require_tables(features)
        if run["sae"] == DELPHI:
            raise InputError(
                f"{features} holds tables of a cache of delphi; programs need tables of a store."
            )
        store = store_of(features, run, moved.stores)
        sae = None if run["sae"] == IDENTITY else sae_of(features, run, moved.saes)
        rule = RowRule(split="all")
        pairs = store.width(run["site"])
        if sae is not None:
            rule, pairs = (
                sae.config.rule.model_copy(update={"split": "all"}),
                sae.config.k or ACTIVE,
            )
        each = block_rows(store.shard_rows, store.context_length, pairs)
        blocks = Blocks(features, store.n_rows, each, run["n_latents"])
        if len(firing_files(features)) != len(blocks):
            raise RunError(
                f"{features} has {len(firing_files(features))} files of firings, expected "
                f"{len(blocks)}; build the tables again into another folder."
            )
        begins = int(store.plan["bos"] == "context")
        rows = TokenRows.of(_parts(store, run["site"], rule), store.context_length, begins)
        table = pq.read_table(features / "latents.parquet", columns=["n_fire"])
        n_fire = table["n_fire"].to_numpy()
        own = ProgramSource(Suffixes.of(rows), blocks, n_fire > 0)
        return cls(store, sae, own, float(n_fire.sum() / max(run["n_rows"], 1)))

    def encoded(
        self, sae: SAE, folder: Path, device: str, progress: Callable[[int, int], None]
    ) -> ProgramSource:
        """Encode the same rows by another SAE of the same site; its firings are put into a folder.

        Raises:
            DamagedError: an object of the store is damaged.
        """
        sae.save(folder / "sae")
        spec = SourceSpec(self.store.place, str(folder / "sae"), None, None, device)
        source = StoreSource(spec, self.store.digest)
        blocks = Blocks(folder, source.n_rows, source.block_rows, sae.config.n_latents)
        objects, fires = LocalObjects(folder), np.zeros(sae.config.n_latents, np.bool_)
        for block in range(len(blocks)):
            firings = source.firings(*blocks.span(block), BATCH_ROWS, Event())
            fires |= np.diff(firings.starts) > 0
            publish(objects, block, firings)
            progress(block + 1, len(blocks))
        return ProgramSource(self.own.suffixes, blocks, fires)


def _parts(store: ActivationStore, site: str, rule: RowRule) -> Iterator[RowsPart]:
    """Yield the rows of a store, shard by shard."""
    length = store.context_length
    for shard in range(store.n_shards):
        first, last = store.shard_span(shard)
        tokens = store.tokens(first // length, last // length).reshape(-1)
        yield tokens, *store.row_documents(shard), store.selected_in_shard(site, rule, shard)
