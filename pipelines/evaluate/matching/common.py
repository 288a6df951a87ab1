"""The rows that two dictionaries have in common: rows of the same tokens that both of them read."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from sae_harvest.common.errors import InputError
from sae_harvest.pipelines.features.tables.checks import require_tables
from sae_harvest.pipelines.features.tables.folder import DELPHI, IDENTITY
from sae_harvest.pipelines.source import NOTHING_MOVED, Locations, sae_of, store_of
from sae_harvest.store.reader import ActivationStore
from sae_harvest.store.rules import RowRule
from sae_harvest.train.sae.sae import SAE

CONTEXTS = 4096  # contexts compared at a time


@dataclass(frozen=True, eq=False)
class Side:
    """One of the two dictionaries."""

    features: Path
    """Folder of its tables."""

    run: dict[str, Any]
    """Content of the tables' run.json."""

    store: ActivationStore
    """The store that the tables were made from."""

    sae: SAE | None
    """The SAE; None for the neurons of a site."""

    @classmethod
    def open(cls, features: Path, moved: Locations = NOTHING_MOVED) -> Side:
        """Open the tables in a folder, their store and their SAE.

        Raises:
            RunError: there are no tables, or their store or SAE is missing.
            InputError: the tables were made from a cache without a store.
        """
        run = require_tables(features)
        if run["sae"] == DELPHI:
            raise InputError(
                f"{features} holds tables of a cache of delphi, which has no store; compare tables "
                "that were made from a store."
            )
        sae = None if run["sae"] == IDENTITY else sae_of(features, run, moved.saes)
        return cls(features, run, store_of(features, run, moved.stores), sae)

    @property
    def n_latents(self) -> int:
        """Number of latents."""
        return int(self.run["n_latents"])

    @property
    def rule(self) -> RowRule:
        """The rule that selected the rows of the tables."""
        rule = RowRule() if self.sae is None else self.sae.config.rule
        return rule.model_copy(update={"split": "all"})

    def is_read(self, first: int, last: int) -> npt.NDArray[np.bool_]:
        """Return which of the rows [first, last) the rule selects."""
        per_shard = self.store.shard_rows
        parts = []
        for shard in range(first // per_shard, -(-last // per_shard)):
            start, stop = self.store.shard_span(shard)
            rows = self.store.selected_in_shard(self.run["site"], self.rule, shard)
            parts.append(rows[max(first, start) - start : min(last, stop) - start])
        return np.concatenate(parts)


@dataclass(frozen=True, eq=False)
class CommonRows:
    """Rows of the same tokens in the stores of both sides, that both sides read."""

    a: Side
    b: Side

    n_rows: int
    """Rows 0 to n_rows - 1 have the same tokens in both stores."""

    @property
    def context_length(self) -> int:
        """Tokens of a context."""
        return self.a.store.context_length

    def mask(self, first: int, last: int) -> npt.NDArray[np.bool_]:
        """Return which of the rows [first, last) both sides read."""
        same = self.a.run["site"] == self.b.run["site"] and self.a.rule == self.b.rule
        mine = self.a.is_read(first, last)
        if same and self.a.store.digest == self.b.store.digest:
            return mine
        return mine & self.b.is_read(first, last)


def common_rows(a: Side, b: Side) -> CommonRows:
    """Compare the tokens of the two stores.

    Stores of one text may differ in model, site or size: the rows of the smaller one count, if
    their tokens are the same in the larger one.

    Raises:
        InputError: the stores hold other tokens, or contexts of another length.
    """
    if a.store.digest == b.store.digest:
        return CommonRows(a, b, a.store.n_rows)
    places = f"{a.store.place} and {b.store.place}"
    if a.store.context_length != b.store.context_length:
        raise InputError(
            f"{places} have contexts of {a.store.context_length} and {b.store.context_length} "
            "tokens, so their rows are not the same; harvest both with one --context-length."
        )
    n = min(a.store.n_contexts, b.store.n_contexts)
    for first in range(0, n, CONTEXTS):
        last = min(first + CONTEXTS, n)
        differ = (a.store.tokens(first, last) != b.store.tokens(first, last)).any(axis=1)
        if differ.any():
            context = first + int(differ.argmax())
            raise InputError(
                f"{places} hold other texts, first in context {context:,}, so their rows are not "
                "the same; harvest both from one corpus with one seed and tokenizer."
            )
    return CommonRows(a, b, n * a.store.context_length)
