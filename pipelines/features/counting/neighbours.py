"""Similar latents: by cosine of decoder rows, and by firing on the same rows."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from numba import get_num_threads

from sae_harvest.pipelines.features.counting.cofiring import most_together, transposed
from sae_harvest.pipelines.features.encoding.firings import READS, Blocks
from sae_harvest.train.sae.kernels import cpu_choice
from sae_harvest.train.sae.kernels.cpu import CpuKernels

BLOCK, BATCH = 2048, 8192  # latents at a time, and latents compared with them at a time
SPARE = 2  # latents compared exactly, per latent needed
MAX_PAIRS = 1 << 29  # most (row, latent, latent); with more, evenly spaced contexts are counted
MAX_FIRINGS = 1 << 25  # most firings read, 8 bytes each; with more, the same


@dataclass(eq=False)
class Neighbours:
    """Neighbours of the latents [first, first + n)."""

    first: int
    """The first latent."""
    alike: npt.NDArray[np.int64]
    """[n, neighbours], latents with the highest decoder cosine; -1 where there are fewer."""
    along: npt.NDArray[np.int64]
    """[n, neighbours], latents with the highest Jaccard index; -1 where there are fewer."""
    alike_cosine: npt.NDArray[np.float32]
    """[n, neighbours], cosine of decoder rows with `alike`; NaN if unknown."""
    along_cosine: npt.NDArray[np.float32]
    """[n, neighbours], cosine of decoder rows with `along`; NaN if unknown."""
    alike_together: npt.NDArray[np.int64]
    """[n, neighbours], counted rows on which the latent and `alike` both fire."""
    along_together: npt.NDArray[np.int64]
    """[n, neighbours], counted rows on which the latent and `along` both fire."""
    fired: npt.NDArray[np.int64]
    """[n_latents], counted rows on which each latent fires."""


def counted_share(n_pairs: int, n_rows: int) -> float:
    """Return the share of contexts on which co-firing is counted: 1 unless that takes too long."""
    pairs_of_pairs = n_pairs**2 / max(n_rows, 1)
    return min(1.0, MAX_PAIRS / max(pairs_of_pairs, 1.0), MAX_FIRINGS / max(n_pairs, 1))


def counted_rows(first: int, last: int, context_length: int, share: float) -> npt.NDArray[np.bool_]:
    """Return a mask of the rows [first, last) in counted contexts."""
    contexts = np.arange(first // context_length, last // context_length)
    chosen = np.floor((contexts + 1) * share) > np.floor(contexts * share)
    return np.repeat(chosen, context_length)


def neighbours(
    blocks: Blocks,
    context_length: int,
    W_dec: torch.Tensor | None,
    n: int,
    share: float,
    first: int,
    last: int,
) -> Neighbours:
    """Find the n nearest of the latents [first, last) over all pairs, by cosine and by co-firing.

    Without W_dec, `alike` has no columns.
    """
    by_row = counted_firings(blocks, context_length, share)
    by_latent = transposed(*by_row, blocks.n_latents)
    alike = np.empty((last - first, 0), np.int64)
    if W_dec is not None:
        alike = decoder_neighbours(W_dec, first, last, n)
    n_along, parts = min(n, blocks.n_latents - 1), 4 * get_num_threads()
    starts, latents = by_row
    small = latents.astype(np.uint16 if blocks.n_latents <= 1 << 16 else np.int32)
    along, alike_together, along_together = most_together(
        first, *by_latent, starts, small, alike, n_along, parts
    )
    return Neighbours(
        first,
        alike,
        along,
        _cosines(W_dec, first, alike),
        _cosines(W_dec, first, along),
        alike_together,
        along_together,
        np.diff(by_latent[0]),
    )


def counted_firings(
    blocks: Blocks, context_length: int, share: float
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int32]]:
    """Return the latents that fire on each counted row: starts [rows + 1], latents [pairs].

    Only rows with a firing are included, and they get new numbers.
    """

    def count(block: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int32]]:
        counted = counted_rows(*blocks.span(block), context_length, share)
        if not counted.any():
            return np.empty(0, np.int64), np.empty(0, np.int32)
        firings = blocks.read(block)
        inside = counted[firings.row]
        starts = np.concatenate([[0], np.cumsum(inside)])[firings.starts]
        row_starts, found = transposed(starts, firings.row[inside], len(counted))
        fires = np.diff(row_starts)
        return fires[fires > 0], found

    with ThreadPoolExecutor(READS) as pool:
        lengths, latents = zip(*pool.map(count, range(len(blocks))), strict=True)
    starts = np.concatenate([[0], np.cumsum(np.concatenate(lengths))])
    return starts, np.concatenate(latents)


def decoder_neighbours(
    W_dec: torch.Tensor, first: int, last: int, n_neighbours: int
) -> npt.NDArray[np.int64]:
    """Find the latents with the highest decoder cosine to each of [first, last).

    A low-precision product finds candidates. If exact cosines don't prove that these are the
    nearest, the n-th cosine is a lower bound; a second product finds all latents that may reach it,
    and exact cosines decide.

    Args:
        W_dec: [n_latents, d_out] float32.

    Returns:
        [last - first, min(n_neighbours, n_latents - 1)], nearest first; of equal ones, the lower.
    """
    unit = torch.nn.functional.normalize(W_dec, dim=1)
    n = max(0, min(n_neighbours, len(unit) - 1))
    kernels, zeros = CpuKernels(), torch.zeros(len(unit))
    low = kernels.low_precision(unit)
    count = min(low.candidates(SPARE * (n + 1)), len(unit))  # a row is nearest to itself

    def ranked(own: torch.Tensor, others: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Sort others [own, any], -1: none, by decreasing cosine; return cosines and numbers."""
        cosines = kernels.preactivations(unit[own], unit, zeros, others)
        cosines.masked_fill_((others == own[:, None]) | (others < 0), -torch.inf)
        cosines, order = cosines.sort(dim=1, descending=True, stable=True)
        return cosines, others.gather(1, order).long()

    found = torch.empty(last - first, n, dtype=torch.int64)
    for begin in range(first, last if n else first, BLOCK):
        own = torch.arange(begin, min(begin + BLOCK, last))
        factors = low.factors(unit[own])
        cosines, numbers = ranked(own, cpu_choice.largest(factors, zeros, count))
        found[own - first] = numbers[:, :n]
        # the least cosine chosen, not counting itself: in low precision, no other one is above it
        least = torch.where(cosines[:, -1].isinf(), cosines[:, -2], cosines[:, -1])
        most = least + 2 * factors.doubt * factors.spread.max()
        unsure = own[~(cosines[:, n - 1] > most)]
        if count == len(unit) or not len(unsure):
            continue
        bound, mine, pairs = cosines[unsure - begin, n - 1], low.rows(unsure), []
        for start in range(0, len(unit), BATCH):  # the product is symmetric
            batch = unit[start : start + BATCH]
            near = kernels.choose_above(batch, mine, zeros[: len(unsure)], bound)  # [batch, any]
            other, place = (near >= 0).nonzero(as_tuple=True)
            pairs.append(torch.stack([near[other, place].long(), start + other]))
        others = _listed(torch.cat(pairs, 1), len(unsure))
        found[unsure - first] = ranked(unsure, others)[1][:, :n]
    return found.numpy()


def _listed(pairs: torch.Tensor, n: int) -> torch.Tensor:
    """List the numbers of each place, int32 [n, any], -1: none, from pairs (place, number).


    The order of the pairs is kept.
    """
    order = pairs[0].argsort(stable=True)
    place, number = pairs[0, order], pairs[1, order]
    counts = torch.bincount(place, minlength=n)
    inside = torch.arange(len(place)) - (counts.cumsum(0) - counts)[place]
    out = torch.full((n, int(counts.max())), -1, dtype=torch.int32)
    out[place, inside] = number.int()
    return out


def _cosines(
    W_dec: torch.Tensor | None, first: int, others: npt.NDArray[np.int64]
) -> npt.NDArray[np.float32]:
    """Compute cosines of the rows from `first` on with those of `others`; NaN if unknown."""
    if W_dec is None or not others.size:
        return np.full(others.shape, np.nan, np.float32)
    unit = torch.nn.functional.normalize(W_dec, dim=1)
    own, zeros = unit[first : first + len(others)], torch.zeros(len(unit))
    numbers = torch.from_numpy(others).int()
    return CpuKernels().preactivations(own, unit, zeros, numbers).numpy()
