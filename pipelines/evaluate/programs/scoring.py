"""Programs of all latents, learnt and scored from stored firings, a few latents at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from sae_harvest.common.cache import use_numba_cache
from sae_harvest.pipelines.evaluate.intervals import CLUSTERS, Floats
from sae_harvest.pipelines.evaluate.programs.counting import DECILES, SUMS, count
from sae_harvest.pipelines.evaluate.programs.firings import SplitFirings, split_firings
from sae_harvest.pipelines.evaluate.programs.learning import learn
from sae_harvest.pipelines.evaluate.programs.scores import Added, Means, Scores, scores_of
from sae_harvest.pipelines.evaluate.programs.suffixes import BACK, Suffixes
from sae_harvest.pipelines.evaluate.programs.tries import PARENT, PATTERN, Tries, nodes_of_rows
from sae_harvest.pipelines.features.encoding.firings import Blocks

use_numba_cache()

from numba import get_num_threads  # noqa: E402

TOKENS, NGRAMS = "tokens", "ngrams"
KINDS = {TOKENS: 0, NGRAMS: BACK}  # how many tokens before the row a program looks at
GROUP = 64  # latents of a task; a latent is compared with the program of another of its group
AT_ONCE = 1 << 22  # firings in memory at once, about


@dataclass(frozen=True, eq=False)
class Group:
    """Programs of one kind, of some latents, with their scores."""

    kind: str
    """Kind of the programs."""
    tries: Tries
    """The programs."""
    scores: Scores
    """Their scores."""
    added: Added
    """Contributions of the latents to the means."""


def programs(
    suffixes: Suffixes,
    blocks: Blocks,
    means: dict[str, Means],
    kinds: Sequence[str] = tuple(KINDS),
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Iterator[list[Group]]:
    """Learn and score the programs of all latents; yield those of each kind for some latents.

    Args:
        suffixes: patterns of the store's rows.
        blocks: the firings.
        means: the means of each kind; the latents are added.
        kinds: tokens, ngrams.
        progress: called with latents done and their number.

    Raises:
        RunError: a file of firings is missing or damaged.
    """
    cluster_rows = suffixes.cluster_rows

    def task(begin: int, train: SplitFirings, test: SplitFirings) -> list[Group]:
        found = []
        for kind in kinds:
            tries = learn(suffixes, begin, train, KINDS[kind])
            found.append(score(kind, tries, suffixes, test, cluster_rows))
        return found

    with ThreadPoolExecutor(get_num_threads()) as pool:
        for first, last in _spans(blocks):
            train, test = split_firings(suffixes.rows, blocks, first, last)
            begins = range(first, last, GROUP)
            inside = [(begin - first, min(begin + GROUP, last) - first) for begin in begins]
            parts = [[firings.of(*span) for span in inside] for firings in (train, test)]
            for groups in pool.map(task, begins, *parts):
                for group in groups:
                    means[group.kind].add(group.added)
                yield groups
                progress(groups[0].tries.first + len(groups[0].tries), blocks.n_latents)


def score(
    kind: str,
    tries: Tries,
    suffixes: Suffixes,
    firings: SplitFirings,
    cluster_rows: npt.NDArray[np.int64],
) -> Group:
    """Score the programs of some latents.

    Args:
        kind: kind of the programs.
        tries: the programs.
        suffixes: patterns of the rows.
        firings: the latents' firings on held-out rows.
        cluster_rows: held-out rows in each cluster, int64 [256].
    """
    n = len(tries)
    sums, others = np.zeros((2, n, CLUSTERS, SUMS))
    auprc, other_auprc = np.full((2, n), np.nan)
    recall, unused = np.empty((n, DECILES), np.float32), np.empty(DECILES, np.float32)
    others_of = next_of(np.diff(tries.starts) > 0)
    for latent in range(n):
        given = suffixes, firings.of(latent, latent + 1), cluster_rows
        auprc[latent] = _count(tries, latent, *given, sums[latent], recall[latent])
        if (other := int(others_of[latent])) != latent:
            other_auprc[latent] = _count(tries, other, *given, others[latent], unused)
    found = scores_of(sums, auprc, others, other_auprc, recall)
    return Group(kind, tries, *found)


def next_of(alive: npt.NDArray[np.bool_]) -> npt.NDArray[np.int64]:
    """Return the place of the next living latent after each one, going round, or its own place."""
    places = np.flatnonzero(alive)
    if not len(places):
        return np.arange(len(alive))
    after = np.searchsorted(places, np.arange(len(alive)), side="right")
    return places[after % len(places)]


def _spans(blocks: Blocks) -> list[tuple[int, int]]:
    """Divide the latents into pieces of whole groups whose firings fit into memory."""
    n = blocks.n_latents
    per_latent = max(1.0, blocks.n_pairs / max(n, 1))
    each = max(1, int(AT_ONCE / per_latent / GROUP)) * GROUP
    return [(first, min(first + each, n)) for first in range(0, n, each)]


def _count(
    tries: Tries,
    latent: int,
    suffixes: Suffixes,
    firings: SplitFirings,
    cluster_rows: npt.NDArray[np.int64],
    sums: Floats,
    recall: npt.NDArray[np.float32],
) -> float:
    """Do `count` for the program of a latent and the firings of the same or another one."""
    first, last = tries.starts[latent], tries.starts[latent + 1]
    nodes = tries.nodes[first:last]
    pattern = nodes[:, PATTERN]
    auprc: float = count(
        tries.value[first:last],
        np.where(nodes[:, PARENT] < 0, -1, nodes[:, PARENT] - first),
        suffixes.test_starts[pattern],
        suffixes.test_starts[pattern + 1],
        suffixes.test_cluster,
        suffixes.test_count,
        tries.threshold[latent],
        nodes_of_rows(first, last, tries.nodes, suffixes.number, firings.row),
        firings.value,
        firings.order,
        suffixes.rows.cluster[firings.row],
        cluster_rows,
        sums,
        recall,
    )
    return auprc
