"""Stored firings of some latents, divided into those on training rows and on held-out rows."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from sae_harvest.common.cache import use_numba_cache
from sae_harvest.pipelines.evaluate.programs.suffixes import TokenRows
from sae_harvest.pipelines.features.encoding.firings import Blocks

use_numba_cache()

from numba import njit  # noqa: E402


@dataclass(frozen=True, eq=False)
class SplitFirings:
    """Firings of some latents on some rows, sorted by latent, then row."""

    starts: npt.NDArray[np.int64]
    """Where each latent's firings begin [latents + 1]."""
    row: npt.NDArray[np.int64]
    """Numbers of rows [firings]."""
    value: npt.NDArray[np.float32]
    """Activations [firings]."""

    @cached_property
    def order(self) -> npt.NDArray[np.int64]:
        """Places of the firings by increasing activation; equal ones by row. For one latent."""
        return np.argsort(self.value, kind="stable")

    def of(self, first: int, last: int) -> SplitFirings:
        """Return the firings of the latents [first, last), counted from the first latent here."""
        low, high = self.starts[first], self.starts[last]
        return SplitFirings(
            self.starts[first : last + 1] - low, self.row[low:high], self.value[low:high]
        )


def split_firings(
    rows: TokenRows, blocks: Blocks, first: int, last: int
) -> tuple[SplitFirings, SplitFirings]:
    """Read the firings of the latents [first, last) on training rows, and on held-out rows."""
    parts = [part for here, part in blocks.all(first, last) if here.start < len(rows.token)]
    found = []
    for mask in (rows.train, rows.test):
        counts = np.zeros(last - first, np.int64)
        for part in parts:
            _count_kept(part.starts, part.row, part.first_row, mask, counts)
        starts = np.concatenate([[0], np.cumsum(counts)])
        ends = starts[:-1].copy()
        row, value = np.empty(starts[-1], np.int64), np.empty(starts[-1], np.float32)
        for part in parts:
            _keep(part.starts, part.row, part.value, part.first_row, mask, ends, row, value)
        found.append(SplitFirings(starts, row, value))
    return found[0], found[1]


@njit(nogil=True, cache=True)
def _count_kept(
    starts: npt.NDArray[np.int64],
    row: npt.NDArray[np.int32],
    first_row: int,
    mask: npt.NDArray[np.bool_],
    counts: npt.NDArray[np.int64],
) -> None:
    """Count the firings of each latent on rows of the mask, in place."""
    for latent in range(len(counts)):
        for p in range(starts[latent], starts[latent + 1]):
            r = first_row + row[p]
            counts[latent] += r < len(mask) and mask[r]


@njit(nogil=True, cache=True)
def _keep(
    starts: npt.NDArray[np.int64],
    row: npt.NDArray[np.int32],
    value: npt.NDArray[np.float32],
    first_row: int,
    mask: npt.NDArray[np.bool_],
    ends: npt.NDArray[np.int64],
    rows: npt.NDArray[np.int64],
    values: npt.NDArray[np.float32],
) -> None:
    """Append the firings of each latent on rows of the mask, in place."""
    for latent in range(len(ends)):
        at = ends[latent]
        for p in range(starts[latent], starts[latent + 1]):
            r = first_row + row[p]
            if r < len(mask) and mask[r]:
                rows[at], values[at] = r, value[p]
                at += 1
        ends[latent] = at
