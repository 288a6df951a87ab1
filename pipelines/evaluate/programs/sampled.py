"""N2G programs of some latents, scored over all held-out rows."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from sae_harvest.pipelines.evaluate.intervals import CLUSTERS
from sae_harvest.pipelines.evaluate.programs import n2g
from sae_harvest.pipelines.evaluate.programs.counting import DECILES, SUMS, count
from sae_harvest.pipelines.evaluate.programs.firings import SplitFirings
from sae_harvest.pipelines.evaluate.programs.forms import PRINTED, Patterns, line_of
from sae_harvest.pipelines.evaluate.programs.n2g import Program
from sae_harvest.pipelines.evaluate.programs.scores import Means, Scores, scores_of
from sae_harvest.pipelines.evaluate.programs.scoring import next_of
from sae_harvest.pipelines.evaluate.programs.suffixes import TokenRows

N2G, EXCEPTIONS = "n2g", "n2g_exceptions"
SAMPLED = (N2G, EXCEPTIONS)

FiringsOf = Callable[[int], tuple[SplitFirings, SplitFirings]]  # on training and held-out rows


@dataclass(frozen=True, eq=False)
class Sampled:
    """Scored programs of some latents."""

    latents: npt.NDArray[np.int64]
    """The latents [latents]."""
    thresholds: npt.NDArray[np.float64]
    """Least prediction that counts as a firing, by latent [latents]."""
    patterns: Patterns
    """Their patterns, in the order in which they decide."""
    decided: npt.NDArray[np.int64]
    """Training rows on which each pattern decides [patterns]."""
    scores: Scores
    """Their scores."""

    def texts(self, text: Callable[[int], str]) -> list[str]:
        """Write the programs as text, a line each.

        Patterns that predict a firing come first, those with most predicted activation over the
        training rows first; then the others, those with most rows first.
        """
        p, lines = self.patterns, []
        for latent in range(len(self.latents)):
            span = range(p.starts[latent], p.starts[latent + 1])
            fires = p.value >= self.thresholds[latent]
            weight = np.where(fires, self.decided * p.value, self.decided)
            ordered = sorted(span, key=lambda n: (not fires[n], -weight[n], n))
            shown = [
                (p.token[p.ends[n] : p.ends[n + 1]].tolist(), float(p.value[n]))
                for n in ordered[:PRINTED]
            ]
            lines.append(line_of(shown, len(ordered), text))
        return lines


def score(
    rows: TokenRows,
    programs: Sequence[tuple[int, Program]],
    firings_of: FiringsOf,
    means: Means,
) -> Sampled:
    """Score programs over all held-out rows.

    Args:
        rows: rows of the store.
        programs: latents and their programs.
        firings_of: gives the firings of a latent on training and on held-out rows.
        means: means over latents; these latents are added.
    """
    n = len(programs)
    sums, others = np.zeros((2, n, CLUSTERS, SUMS))
    auprc, other_auprc = np.full((2, n), np.nan)
    recall, unused = np.empty((n, DECILES), np.float32), np.empty(DECILES, np.float32)
    matched = [_Matched.of(rows, program, firings_of(latent)[0]) for latent, program in programs]
    cluster_rows = np.bincount(rows.cluster[rows.test], minlength=CLUSTERS)
    others_of = next_of(np.array([len(program.patterns) > 0 for _, program in programs], bool))
    for i, (latent, _) in enumerate(programs):
        firings = firings_of(latent)[1]
        auprc[i] = matched[i].count(rows, firings, cluster_rows, sums[i], recall[i])
        if (other := int(others_of[i])) != i:
            other_auprc[i] = matched[other].count(rows, firings, cluster_rows, others[i], unused)
    scores, added = scores_of(sums, auprc, others, other_auprc, recall)
    means.add(added)
    return Sampled(
        np.array([latent for latent, _ in programs], np.int64),
        np.array([one.threshold for one in matched]),
        _joined([program for _, program in programs]),
        np.concatenate([np.empty(0, np.int64), *(one.decided for one in matched)]),
        scores,
    )


@dataclass(frozen=True, eq=False)
class _Matched:
    """A program with the rows that each of its patterns decides."""

    value: npt.NDArray[np.float64]
    """Prediction of each pattern [patterns]."""
    pattern: npt.NDArray[np.int32]
    """Pattern of each row, or -1 [rows]."""
    decided: npt.NDArray[np.int64]
    """Training rows on which each pattern decides [patterns]."""
    threshold: float
    """Least prediction that counts as a firing."""

    @classmethod
    def of(cls, rows: TokenRows, program: Program, train: SplitFirings) -> _Matched:
        """Match all rows, and choose the threshold with the highest F1 on training rows."""
        value = np.array(program.predictions, np.float64)
        pattern = n2g.match(rows, program.patterns)
        n = len(value)
        here = pattern[rows.train]
        matched = np.bincount(here[here >= 0], minlength=n)
        caught = pattern[train.row]
        hits = np.bincount(caught[caught >= 0], minlength=n)
        order = np.argsort(-value, kind="stable")
        f1 = 2 * hits[order].cumsum() / np.maximum(matched[order].cumsum() + len(train.row), 1)
        # the last of equal predictions, which are above 0
        ends = np.flatnonzero((np.diff(value[order], append=-1.0) != 0) & (value[order] > 0))
        best = ends[np.argmax(f1[ends])] if len(ends) else 0
        fires = len(ends) and f1[best] > 0
        return cls(value, pattern, matched, float(value[order[best]]) if fires else np.inf)

    def count(
        self,
        rows: TokenRows,
        firings: SplitFirings,
        cluster_rows: npt.NDArray[np.int64],
        sums: npt.NDArray[np.float64],
        recall: npt.NDArray[np.float32],
    ) -> float:
        """Do `counting.count` for the firings of a latent on held-out rows."""
        n = len(self.value)
        here = rows.test & (self.pattern >= 0)
        key = self.pattern[here].astype(np.int64) * CLUSTERS + rows.cluster[here]
        entries, counts = np.unique(key, return_counts=True)
        starts = np.searchsorted(entries, np.arange(n + 1) * CLUSTERS)
        auprc: float = count(
            self.value,
            np.full(n, -1),
            starts[:-1],
            starts[1:],
            (entries % CLUSTERS).astype(np.uint8),
            counts.astype(np.int32),
            self.threshold,
            self.pattern[firings.row],
            firings.value,
            firings.order,
            rows.cluster[firings.row],
            cluster_rows,
            sums,
            recall,
        )
        return auprc


def _joined(programs: Iterable[Program]) -> Patterns:
    starts, ends, tokens, values = [0], [0], list[int](), list[float]()
    for program in programs:
        for pattern, value in zip(program.patterns, program.predictions, strict=True):
            tokens += pattern
            ends.append(len(tokens))
            values.append(value)
        starts.append(len(values))
    return Patterns(
        np.array(starts), np.array(ends), np.array(tokens, np.int32), np.array(values, np.float32)
    )
