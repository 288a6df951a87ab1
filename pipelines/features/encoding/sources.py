"""The source of a build's firings: a store encoded by a dictionary, or a delphi cache."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from threading import Event
from typing import Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import xxhash

from sae_harvest.common.errors import InputError, RunError
from sae_harvest.common.finite import require_finite
from sae_harvest.harvest.model.models import ResolvedModel, load_tokenizer, resolve_model
from sae_harvest.harvest.model.sites import Site
from sae_harvest.pipelines.features.encoding.delphi_cache import DelphiCache
from sae_harvest.pipelines.features.encoding.dictionary import Dictionary, load_dictionary
from sae_harvest.pipelines.features.encoding.encode import OneAtATime, batches, encode
from sae_harvest.pipelines.features.encoding.firings import Firings, block_rows
from sae_harvest.pipelines.features.tables.folder import DELPHI
from sae_harvest.pipelines.features.tables.rows import RowsPart
from sae_harvest.pipelines.features.tables.texts import TokenTexts
from sae_harvest.pipelines.source import model_of
from sae_harvest.store.reader import ActivationStore
from sae_harvest.store.rules import RowRule

BLOCK_FIRINGS = 1 << 22  # about so many firings in a block of a cache
CONTEXTS = 4096  # contexts of a cache that are read at a time


@dataclass(frozen=True)
class SourceSpec:
    """The source of a build, in a form that can be sent to a worker."""

    store: str
    """Place of a store, or folder of a cache."""
    sae: str
    """Path of a trained SAE; `identity` for the neurons of a site; `delphi` for a cache."""
    site: str | None
    """Site, if several are possible."""
    model: str | None
    """Model of a cache that does not name it."""
    device: str
    """Device on which an SAE encodes."""


class Source(Protocol):
    """Rows of tokens, in whole contexts, and the latents that fire on them."""

    place: str
    """Absolute path or address."""
    digest: str
    """Identity by content."""
    model_name: str
    """Name of the model."""
    n_rows: int
    """Number of rows."""
    context_length: int
    """Tokens of a context."""
    block_rows: int
    """Rows of a block, which fit into memory with their firings."""
    dictionary: Dictionary
    """The latents."""

    @property
    def model(self) -> ResolvedModel:
        """Find the model of the tokens; `InputError` if it is not found."""
        ...

    def rows(self) -> Iterator[RowsPart]:
        """Yield all rows, some at a time."""
        ...

    def firings(self, first: int, last: int, batch_rows: int, stopped: Event) -> Firings:
        """Return the firings of the rows [first, last), whole contexts; several threads may call
        this.

        `stopped` is set when the result is no longer needed.
        """
        ...

    def documents(self) -> pa.Table:
        """Return a table with one row per document: document, source, title, url."""
        ...


def open_source(given: SourceSpec, digest: str | None = None) -> Source:
    """Open a source; a store that has grown is opened as it was with this digest.

    Raises:
        RunError: SAE and store do not fit, or a cache has another digest.
        InputError: something is missing or damaged, or the options do not fit together.
    """
    if given.sae != DELPHI:
        if given.model is not None:
            raise InputError("A store names its model; --model is for caches of delphi.")
        return StoreSource(given, digest)
    source = CacheSource(given)
    if digest not in (None, source.digest):
        raise RunError(f"The cache in {given.store} has changed; build again.")
    return source


class StoreSource:
    """A store, with an SAE or with neurons of the store."""

    def __init__(self, given: SourceSpec, digest: str | None) -> None:
        self.store = ActivationStore.open(given.store, digest)
        self.dictionary = load_dictionary(self.store, given.sae, given.site, given.device)
        self.place, self.digest = self.store.place, self.store.digest
        self.model_name: str = self.store.plan["model"]["name"]
        self.n_rows, self.context_length = self.store.n_rows, self.store.context_length
        pairs = self.dictionary.pairs_per_row
        self.block_rows = block_rows(self.store.shard_rows, self.context_length, pairs)
        self._chunk_rows = self.store.chunk_rows(self.dictionary.site)
        encoder = self.dictionary.encoder
        assert encoder is not None
        # one thread at a time uses the GPU, while others read and sort
        self._encoder = encoder if given.device == "cpu" else OneAtATime(encoder)

    @cached_property
    def model(self) -> ResolvedModel:
        return model_of(self.store)

    def rows(self) -> Iterator[RowsPart]:
        length = self.context_length
        for shard in range(self.store.n_shards):
            first, last = self.store.shard_span(shard)
            tokens = self.store.tokens(first // length, last // length).reshape(-1)
            documents, hashes = self.store.row_documents(shard)
            rule, site = self.dictionary.rule, self.dictionary.site
            yield tokens, documents, hashes, self.store.selected_in_shard(site, rule, shard)

    def firings(self, first: int, last: int, batch_rows: int, stopped: Event) -> Firings:
        selected, site = self._selected(first, last), self.dictionary.site

        def read(low: int, high: int) -> npt.NDArray[np.floating]:
            x = self.store.read(site, low, high)
            require_finite(x, self.store.place, site, low, selected[low - first : high - first])
            return x

        given = batches(read, selected, first, self._chunk_rows, batch_rows)
        return encode(self._encoder, self.dictionary.n_latents, first, given, stopped)

    def _selected(self, first: int, last: int) -> npt.NDArray[np.bool_]:
        """Mask of the rows of a block that the rule selects."""
        shard, begin = divmod(first, self.store.shard_rows)
        rule, site = self.dictionary.rule, self.dictionary.site
        return self.store.selected_in_shard(site, rule, shard)[begin : begin + last - first]

    def documents(self) -> pa.Table:
        parts = [self.store.documents(shard) for shard in range(self.store.n_shards)]
        documents = pa.concat_tables(parts).sort_by("document")
        # texts stay in the store: a table for browsing should not hold the corpus
        return documents.drop_columns([name for name in documents.column_names if name == "text"])


class CacheSource:
    """A cache of delphi. It holds neither documents nor weights.

    Each context counts as a document; its tokens decide whether it is for explanations or for
    scores. Activations are float16, as delphi has rounded them.
    """

    def __init__(self, given: SourceSpec) -> None:
        self._cache = cache = DelphiCache(Path(given.store))
        self.place, self.digest = str(cache.folder.resolve()), cache.digest()
        self.n_rows, self.context_length = cache.n_rows, cache.context_length
        per_context = max(1, -(-cache.n_firings // max(1, len(cache.tokens))))
        self.block_rows = self.context_length * max(1, BLOCK_FIRINGS // per_context)
        if given.site is None:
            raise InputError(
                f"{given.store} does not name its site; give it, such as --site resid_post.8."
            )
        name = given.model or cache.model_name
        if name is None:
            raise InputError(f"{given.store} does not name its model; give --model.")
        self.model_name, site = name, str(Site.parse(given.site))
        self.dictionary = Dictionary(
            site=site,
            rule=RowRule(split="all", max_norm_medians=None),
            encoder=None,
            n_latents=cache.n_latents,
            pairs_per_row=-(-cache.n_firings // max(1, cache.n_rows)),
            digest=self.digest,
            W_dec=None,
            writes_to=site,
        )

    @cached_property
    def model(self) -> ResolvedModel:
        model = resolve_model(self.model_name)
        n_tokens = len(TokenTexts(load_tokenizer(model)))
        highest = int(self._cache.tokens.max(initial=0))
        if highest >= n_tokens:
            raise InputError(
                f"{self.place} holds token {highest}, and the tokenizer of {model.name} ends at "
                f"{n_tokens - 1}; give the cache's own model with --model."
            )
        return model

    def rows(self) -> Iterator[RowsPart]:
        for first in range(0, len(self._cache.tokens), CONTEXTS):
            tokens = self._cache.tokens[first : first + CONTEXTS]
            hashes = [xxhash.xxh3_64_intdigest(context.tobytes()) for context in tokens]
            document = np.arange(first, first + len(tokens))
            yield (
                tokens.reshape(-1),
                np.repeat(document, self.context_length),
                np.repeat(np.array(hashes, np.uint64), self.context_length),
                np.ones(tokens.size, np.bool_),
            )

    def firings(self, first: int, last: int, batch_rows: int, stopped: Event) -> Firings:
        return self._cache.firings(first // self.context_length, last // self.context_length)

    def documents(self) -> pa.Table:
        n = len(self._cache.tokens)
        return pa.table(
            {
                "document": np.arange(n),
                "source": pa.array([Path(self.place).name] * n, pa.string()),
                "title": pa.nulls(n, pa.string()),
                "url": pa.nulls(n, pa.string()),
            }
        )
