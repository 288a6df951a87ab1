"""Token and document of each row of a store, found by the row's number.

FEATURES/rows/token.npy       int32, token id
FEATURES/rows/document.npy    int64, its document; -1 between documents
FEATURES/rows/split.npy       uint8, 1: its document is for scores; plus 2: the rule reads it

The files exist during a build only: 13 bytes per row.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import numpy.typing as npt

from sae_harvest.store.rules import heldout_documents

FOLDER = "rows"
SCORE_FRACTION = 0.5
SCORE, READ = 1, 2  # bits of `split`
COLUMNS = {"token": np.int32, "document": np.int64, "split": np.uint8}

# for some rows: token, document, hash of the document's text, whether the rule reads the row
RowsPart = tuple[
    npt.NDArray[np.int32], npt.NDArray[np.int64], npt.NDArray[np.uint64], npt.NDArray[np.bool_]
]


class Rows:
    """The arrays [n_rows] of the files: token, document, split."""

    def __init__(self, out: Path) -> None:
        self.token, self.document, self.split = (
            np.load(out / FOLDER / f"{name}.npy", mmap_mode="r") for name in COLUMNS
        )

    def read(self, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
        """Return a mask of the rows that the rule selects."""
        return (self.split[rows] & READ) > 0

    def scores(self, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
        """Return a mask of the rows whose documents are for scores."""
        return (self.split[rows] & SCORE) > 0


def write_rows(parts: Iterable[RowsPart], n_rows: int, out: Path) -> int:
    """Write the files; return how many rows the rule reads. The parts hold all rows, in order."""
    (out / FOLDER).mkdir(exist_ok=True)
    files = {
        name: np.lib.format.open_memmap(
            out / FOLDER / f"{name}.npy", "w+", np.dtype(dtype), (n_rows,)
        )
        for name, dtype in COLUMNS.items()
    }
    first, n_read = 0, 0
    for tokens, documents, hashes, read in parts:
        here = slice(first, first + len(tokens))
        files["token"][here] = tokens
        files["document"][here] = documents
        files["split"][here] = for_scores(hashes) * np.uint8(SCORE) | read * np.uint8(READ)
        first += len(tokens)
        n_read += int(read.sum())
    for file in files.values():
        file.flush()
    return n_read


def for_scores(text_hash: npt.NDArray[np.uint64]) -> npt.NDArray[np.bool_]:
    """Decide by the document's hash: text shown to an explainer is never used to score it."""
    # Held-out documents are chosen by other bits, so that the two choices are independent.
    turned = (text_hash << np.uint64(32)) | (text_hash >> np.uint64(32))
    return heldout_documents(turned, SCORE_FRACTION)
