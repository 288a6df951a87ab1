"""Which latents are alike: by the cosine of their decoder rows, and by firing together."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from pipelines.features import kernels
from pipelines.features.firings import Blocks
from train.kernels import kernels_for

BLOCK, BATCH = 2048, 8192  # latents, and those they are compared with, at a time
PAIRS = 4096  # whose cosines are taken at a time, in cache
COUNTS = 1 << 28  # numbers of the matrix of firing together at a time, int32
MOST_PAIRS = 1 << 29  # (row, latent, latent) that are counted; above, on evenly spaced contexts


@dataclass(eq=False)
class Neighbours:
    """Latents like each of [first, first + n), arrays [n, neighbours]; -1 where there are fewer.

    alike: with the highest decoder cosine; along: with the highest Jaccard index. alike_together,
    along_together: rows on which both fire, of those counted. fired: int64 [n_latents], on how many
    of those each latent fires.
    """

    first: int
    alike: npt.NDArray[np.int64]
    along: npt.NDArray[np.int64]
    alike_together: npt.NDArray[np.int64]
    along_together: npt.NDArray[np.int64]
    fired: npt.NDArray[np.int64]


def compared_at_once(n_latents: int) -> int:
    """How many latents' neighbours can be counted together."""
    return max(1, COUNTS // n_latents)


def counted_share(n_pairs: int, n_rows: int) -> float:
    """Share of the contexts on which firing together is counted: all, while that takes not long."""
    pairs_of_pairs = n_pairs**2 / max(n_rows, 1)
    return min(1.0, MOST_PAIRS / max(pairs_of_pairs, 1.0))


def counted_rows(first: int, last: int, context_length: int, share: float) -> npt.NDArray[np.bool_]:
    """Which of the rows [first, last), whole contexts, are of counted contexts."""
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
    """The n nearest of the latents [first, last), over all pairs, both ways.

    Without W_dec, `alike` has no columns.
    """
    together = np.zeros((last - first, blocks.n_latents), np.int32)
    fired = np.zeros(blocks.n_latents, np.int64)
    for block in range(len(blocks)):
        span = blocks.span(block)
        counted = counted_rows(*span, context_length, share)
        if not counted.any():
            continue
        firings = blocks.read(block)
        before = np.concatenate([[0], np.cumsum(counted[firings.row])])
        fired += before[firings.starts[1:]] - before[firings.starts[:-1]]
        row_starts, latents = kernels.by_row(firings.starts, firings.row, len(counted))
        some = firings.starts[first : last + 1]
        kernels.count_together(some, firings.row, counted, row_starts, latents, together)
    alike = np.empty((last - first, 0), np.int64)
    if W_dec is not None:
        alike = decoder_neighbours(W_dec, first, last, n)
    along = kernels.most_together(first, together, fired, min(n, blocks.n_latents - 1))
    own = np.arange(last - first)[:, None]
    alike_together, along_together = (
        together[own, others].astype(np.int64) for others in (alike, along)
    )
    return Neighbours(first, alike, along, alike_together, along_together, fired)


def decoder_neighbours(
    W_dec: torch.Tensor, first: int, last: int, n_neighbours: int
) -> npt.NDArray[np.int64]:
    """The latents whose decoder rows point most nearly the same way as those of [first, last).

    A low-precision product names some that are near, the n-th nearest of which bounds how near one
    has to be; a second one names all that may be, and exact cosines decide.

    Args:
        W_dec: [n_latents, d_out] float32.

    Returns:
        [last - first, min(n_neighbours, n_latents - 1)], nearest first, of equal ones the lower.
    """
    unit = torch.nn.functional.normalize(W_dec, dim=1)
    n = max(0, min(n_neighbours, len(unit) - 1))
    kernels, zeros = kernels_for(unit.device), torch.zeros(len(unit))
    low = kernels.low_precision(unit)
    count = min(low.candidates(n + 1), len(unit))  # a row is near itself

    def nearest(own: torch.Tensor, others: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and numbers [own, n] of the nearest among some others [own, any], -1: none."""
        cosines = kernels.preactivations(unit[own], unit, zeros, others)
        cosines.masked_fill_((others == own[:, None]) | (others < 0), -torch.inf)
        cosines, order = cosines.sort(dim=1, descending=True, stable=True)
        return cosines[:, :n], others.gather(1, order)[:, :n].long()

    found = torch.empty(last - first, n, dtype=torch.int64)
    for begin in range(first, last if n else first, BLOCK):
        own = torch.arange(begin, min(begin + BLOCK, last))
        bound = nearest(own, kernels.choose(unit[own], low, zeros, count))[0][:, -1]
        mine, pairs = low.rows(own), []
        for start in range(0, len(unit), BATCH):  # the product is symmetric
            batch = unit[start : start + BATCH]
            near = kernels.choose_above(batch, mine, zeros[: len(own)], bound)  # [batch, any]
            other, place = (near >= 0).nonzero(as_tuple=True)
            pairs.append(torch.stack([near[other, place].long(), start + other]))
        found[begin - first :][: len(own)] = nearest(own, _listed(torch.cat(pairs, 1), len(own)))[1]
    return found.numpy()


def _listed(pairs: torch.Tensor, n: int) -> torch.Tensor:
    """Pairs (place, number) [2, pairs] as the numbers of each place int32 [n, any], -1: none.

    In the order in which they come.
    """
    order = pairs[0].argsort(stable=True)
    place, number = pairs[0, order], pairs[1, order]
    counts = torch.bincount(place, minlength=n)
    inside = torch.arange(len(place)) - (counts.cumsum(0) - counts)[place]
    out = torch.full((n, int(counts.max())), -1, dtype=torch.int32)
    out[place, inside] = number.int()
    return out


def cosines(
    W_dec: torch.Tensor, latent: npt.NDArray[np.integer], other: npt.NDArray[np.integer]
) -> npt.NDArray[np.float32]:
    """Of decoder rows, for pairs [pairs]."""
    unit = torch.nn.functional.normalize(W_dec, dim=1)
    found = [
        (unit[a] * unit[b]).sum(dim=1)
        for a, b in zip(
            torch.from_numpy(latent).long().split(PAIRS),
            torch.from_numpy(other).long().split(PAIRS),
            strict=True,
        )
    ]
    return torch.cat(found).numpy() if found else np.empty(0, np.float32)
