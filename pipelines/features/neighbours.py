"""Which latents are alike: by the cosine of their decoder rows, and by firing together."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from pipelines.features import kernels
from pipelines.features.firings import Blocks

BLOCK = 1024  # rows of the similarity matrix at a time: [1024, n_latents] is never large
PAIRS = 4096  # whose cosines are taken at a time, in cache
COUNTS = 1 << 27  # numbers of the matrix of firing together at a time, int32
MOST_PAIRS = 1 << 30  # (row, latent, latent) that are counted; above, on evenly spaced contexts


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

    Args:
        W_dec: [n_latents, d_out] float32.

    Returns:
        [last - first, min(n_neighbours, n_latents - 1)], nearest first.
    """
    unit = torch.nn.functional.normalize(W_dec, dim=1)
    n = min(n_neighbours, len(unit) - 1)
    found = torch.empty(last - first, n, dtype=torch.int64)
    for low in range(first, last, BLOCK):
        high = min(low + BLOCK, last)
        similarity = unit[low:high] @ unit.T  # [block, n_latents]
        similarity[torch.arange(high - low), torch.arange(low, high)] = -torch.inf
        found[low - first : high - first] = similarity.topk(n, dim=1).indices
    return found.numpy()


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
