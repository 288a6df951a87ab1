"""Rows of held-out documents, drawn with a seed, and latents that fire on them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field

from sae_harvest.common.errors import InputError
from sae_harvest.common.numbers import Count
from sae_harvest.pipelines.evaluate.downstream import heldout_contexts
from sae_harvest.pipelines.evaluate.splicing import replaced_rows
from sae_harvest.store.reader import ActivationStore
from sae_harvest.train.sae.sae import SAE


class AblationConfig(BaseModel):
    """The sample of ablations and the tokens that are looked at.

    >>> AblationConfig(n_rows=8).n_tokens
    16
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    n_rows: Count = Field(32, ge=1, description="rows drawn from held-out documents")
    n_latents: Count = Field(
        4, ge=1, description="latents ablated on each row, drawn from those that fire there"
    )
    n_tokens: Count = Field(
        16, ge=1, description="tokens whose logits are compared: the row's and those after it"
    )
    seed: int = Field(0, ge=0, lt=2**32, description="seed of rows, latents and directions")


def drawn_rows(store: ActivationStore, sae: SAE, config: AblationConfig) -> npt.NDArray[np.int64]:
    """Draw rows, int64 [<= n_rows], increasing.

    A row is drawn if the SAE's rule reads it, and if all tokens whose logits are compared, and the
    one after them, are in its context. The contexts are the first `n_rows` that hold held-out
    documents only; the contexts of a store are in random order.

    Raises:
        InputError: contexts are too short, or none is held out whole.
    """
    if store.context_length <= config.n_tokens:
        raise InputError(
            f"The contexts of {store.place} have {store.context_length} tokens, so none has "
            f"{config.n_tokens} tokens and one after them; compare fewer tokens."
        )
    contexts = heldout_contexts(store, [sae], config.n_rows)
    is_read = replaced_rows(store, sae, contexts)  # [contexts, context_length]
    which, position = np.nonzero(is_read[:, : -config.n_tokens])
    rows = contexts[which] * store.context_length + position
    if not len(rows):
        raise InputError(
            f"{store.place} has no row of held-out documents that the SAE reads; harvest more "
            "tokens."
        )
    drawn = np.random.default_rng(config.seed).permutation(len(rows))[: config.n_rows]
    return np.sort(rows[drawn])


def drawn_latents(active: Sequence[int], n_latents: int, *seeds: int) -> npt.NDArray[np.int64]:
    """Draw latents from those that fire on a row, int64 [<= n_latents], increasing."""
    ordered = np.sort(np.array(active, np.int64))
    drawn = np.random.default_rng(seeds).permutation(len(ordered))[:n_latents]
    return np.sort(ordered[drawn])
