"""Excerpts made by hand."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from sae_harvest.pipelines.explain.excerpts import Excerpt


def excerpt(
    ids: Sequence[int],
    activations: Sequence[float] | None = None,
    *,
    texts: Sequence[str] | None = None,
    stratum: str = "top",
    reason: str | None = None,
    row: int = 0,
    document: int = 0,
    starts_context: bool = False,
) -> Excerpt:
    """An excerpt whose first token is its row."""
    values = np.zeros(len(ids)) if activations is None else activations
    return Excerpt(
        latent=0,
        stratum=stratum,
        reason=reason,
        row=row,
        first_row=row,
        document=document,
        ids=tuple(ids),
        texts=tuple(texts or (f" t{token}" for token in ids)),
        activations=np.array(values, np.float32),
        starts_context=starts_context,
    )
