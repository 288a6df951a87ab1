"""The rule that selects the rows to read. It is saved with every result made from these rows."""

from __future__ import annotations

from typing import Literal

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field

OUTLIER_MEDIANS = 5.0


class RowRule(BaseModel):
    """A choice of rows, by norm and by document.

    >>> RowRule(split="heldout", max_norm_medians=None).split
    'heldout'

    Massive activations (attention sinks: position 0, end-of-text) are about 1 % of rows and
    97 % of the variance, so a fit to all rows would be a fit to these. They are stored, and this
    rule leaves them out. Documents are split by the hash of their text, so equal texts are in the
    same split.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    max_norm_medians: float | None = Field(
        OUTLIER_MEDIANS,
        gt=0,
        le=1e9,
        description="leave out rows whose norm exceeds this many medians of their shard's norms; "
        "none keeps every row",
    )
    heldout_fraction: float = Field(
        0.05, ge=0, lt=1, description="share of documents kept for evaluation only"
    )
    split: Literal["train", "heldout", "all"] = Field(
        "train", description="which documents' rows to read"
    )

    def describe(self) -> str:
        """Return the rule in a few words, to label figures that depend on it."""
        norms = (
            "outlier rows included"
            if self.max_norm_medians is None
            else f"rows above {self.max_norm_medians:g} median norms left out"
        )
        return f"{self.split} documents, {norms}"


def heldout_documents(text_hash: npt.NDArray[np.uint64], fraction: float) -> npt.NDArray[np.bool_]:
    """Whether each document is held out, from the xxh3-64 of its text; shape of `text_hash`."""
    return text_hash < np.uint64(int(fraction * 2.0**64))
