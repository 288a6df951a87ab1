"""Ablation sparsity: how few logits a latent moves, beside channels and random directions.

Gao et al. (2024), section 4.5: ablate a latent that fires on a row, compare the logits of this row
and of the T - 1 tokens after it with the plain ones, and take (l1 / l2)^2 / (V T) of all changes;
see `effects`. The figure is the mean over a sample of firings: rows of held-out documents, and
latents drawn from those that fire on each. It is measured in two conventions, `changes`.

A random direction takes the place of each ablated contribution with the same norm at the same
positions. The sparsity of effects depends on their size, so this is the control to compare with.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor
from transformers import PreTrainedModel

from sae_harvest.common.finite import require_finite
from sae_harvest.harvest.model.sites import Site
from sae_harvest.pipelines.evaluate.ablation import table
from sae_harvest.pipelines.evaluate.ablation.changes import (
    OPERATIONS,
    Change,
    ContextFirings,
    ablation,
    random_change,
)
from sae_harvest.pipelines.evaluate.ablation.effects import Effect, effect_of
from sae_harvest.pipelines.evaluate.ablation.figures import RANDOM_DIRECTION
from sae_harvest.pipelines.evaluate.ablation.passes import changed_logits
from sae_harvest.pipelines.evaluate.ablation.sample import (
    AblationConfig,
    drawn_latents,
    drawn_rows,
)
from sae_harvest.pipelines.evaluate.figures import SAE_ITSELF
from sae_harvest.pipelines.evaluate.splicing import located_sites, replaced_rows, replaced_site
from sae_harvest.pipelines.features.tables.texts import TokenTexts
from sae_harvest.store.reader import ActivationStore
from sae_harvest.train.sae.sae import SAE

DOSE = 0.0  # activation that an ablated latent is held at


@dataclass(frozen=True)
class _Ablated:
    """The keys of one effect."""

    subject: str
    operation: str
    latent: int
    activation: float


def ablation_effects(
    store: ActivationStore,
    model: PreTrainedModel,
    texts: TokenTexts,
    dictionaries: Mapping[str, SAE],
    out: Path,
    config: AblationConfig | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> pa.Table:
    """Ablate latents on a sample of rows, and write `out`/effects.parquet.

    After an interruption at any moment, the same call continues with the rows that are done. If the
    table is there already, it is read.

    Args:
        store: the store whose contexts the model runs over.
        model: the store's model, in evaluation mode. Effects are differences of logits, so it
            should compute in float32, whatever the store was harvested in.
        texts: texts of the model's tokens.
        dictionaries: the trained SAE as `SAE`, and baselines of the same site, such as `channels`,
            by name. All are judged on the same rows.
        out: folder to write.
        config: the sample; 32 rows with 4 latents each, and 16 tokens, by default.
        progress: called with rows done and rows in all.

    Returns:
        The table; see docs/tables.md.

    Raises:
        InputError: no row can be drawn, or the model has no such site.
        RunError: `out` holds effects of another sample, or cannot be written.
    """
    config = config or AblationConfig()
    sae = dictionaries[SAE_ITSELF]
    rows = drawn_rows(store, sae, config)
    asked = {
        "store_digest": store.digest,
        "dictionaries": {name: found.digest for name, found in dictionaries.items()},
        "config": config.model_dump(),
        "dtype": str(model.dtype).removeprefix("torch."),
    }
    path = out / f"{table.NAME}.parquet"
    if not table.finished(out, asked):
        work = _Ablations(store, model, texts, dictionaries, config)
        with table.parts_of(out, asked) as parts:
            missing = parts.missing(len(rows))
            progress(len(rows) - len(missing), len(rows))
            for done, number in enumerate(missing, start=len(rows) - len(missing) + 1):
                parts.write(number, list(work.at(int(rows[number]))))
                progress(done, len(rows))
            table.finish(out, parts, len(rows), asked)
    return table.read(path)


class _Ablations:
    """Ablations of several dictionaries at one row after the other."""

    def __init__(
        self,
        store: ActivationStore,
        model: PreTrainedModel,
        texts: TokenTexts,
        dictionaries: Mapping[str, SAE],
        config: AblationConfig,
    ) -> None:
        self._store, self._model, self._texts = store, model, texts
        self._dictionaries, self._config = dictionaries, config
        self._sae = dictionaries[SAE_ITSELF]
        self._located = located_sites(model, [self._sae])
        self._site = Site.parse(replaced_site(self._sae))

    def at(self, row: int) -> Iterator[dict[str, Any]]:
        """Yield rows of the table, for one row of the store."""
        store, n_tokens = self._store, self._config.n_tokens
        context, position = divmod(row, store.context_length)
        stop = position + n_tokens
        tokens = torch.from_numpy(store.tokens(context, context + 1)[0].astype(np.int64))
        tokens = tokens.to(self._model.device)
        following = tokens[position + 1 : stop + 1]
        shard, inside = divmod(row, store.shard_rows)
        shared = {
            "row": row,
            "dose": DOSE,
            "document": int(store.row_documents(shard)[0][inside]),
            "tokens": n_tokens,
        }
        keys, changes = self._changes(row, stop)
        logits = changed_logits(
            self._model, self._located, self._site, tokens[:stop], n_tokens, changes
        )
        for number, plain, changed in logits:
            effect = effect_of(plain, changed, following)
            yield asdict(keys[number]) | shared | self._columns(effect, plain.shape[1])

    def _changes(self, row: int, stop: int) -> tuple[list[_Ablated], list[Change]]:
        """Return the ablations at a row and what they change."""
        context, position = divmod(row, self._store.context_length)
        x, is_read = self._context(context)
        keys, changes = list[_Ablated](), list[Change]()
        for order, (name, sae) in enumerate(self._dictionaries.items()):
            firings = ContextFirings.of(sae, x, is_read)
            latents, values = (found.tolist() for found in firings.active(position))
            activations = dict(zip(latents, values, strict=True))
            drawn = drawn_latents(
                latents, self._config.n_latents, self._config.seed, row, order
            ).tolist()
            for latent in drawn:
                for operation in OPERATIONS:
                    change = ablation(sae, firings, latent, position, operation, stop)
                    keys.append(_Ablated(name, operation, latent, activations[latent]))
                    changes.append(_on(change, self._model.device))
                    if name != SAE_ITSELF:
                        continue
                    direction = self._direction(row, latent)
                    keys.append(_Ablated(RANDOM_DIRECTION, operation, latent, activations[latent]))
                    changes.append(_on(random_change(change, direction), self._model.device))
        return keys, changes

    def _context(self, context: int) -> tuple[Tensor, Tensor]:
        """Return the rows of a context, float32, and which of them the SAE reads."""
        store, site = self._store, self._sae.config.site
        first = context * store.context_length
        x = store.read(site, first, first + store.context_length)
        is_read = replaced_rows(store, self._sae, np.array([context]))[0]
        require_finite(x, store.place, site, first, is_read)
        return torch.from_numpy(x.astype(np.float32)), torch.from_numpy(is_read)

    def _direction(self, row: int, latent: int) -> Tensor:
        """Return a random direction [width], which depends on the row, the latent and the seed."""
        generator = np.random.default_rng((self._config.seed, row, latent))
        return torch.from_numpy(generator.standard_normal(self._sae.config.width_out)).float()

    def _columns(self, effect: Effect, vocabulary: int) -> dict[str, Any]:
        """Return the columns of an effect; ids beyond the tokenizer's have no text."""
        texts = {
            f"{end}_texts": [
                self._texts.one(token) if token < len(self._texts.table) else None for token in ids
            ]
            for end, ids in (("up", effect.up_ids), ("down", effect.down_ids))
        }
        return asdict(effect) | texts | {"vocabulary": vocabulary}


def _on(change: Change, device: torch.device) -> Change:
    return Change(change.position.to(device), change.vector.to(device))
