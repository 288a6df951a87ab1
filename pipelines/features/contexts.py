"""The examples of some latents: which rows, the text around them, the activations there."""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pipelines.features import kernels
from pipelines.features.candidates import TokenRows, by_neighbour, by_token, inactive
from pipelines.features.config import FeatureConfig
from pipelines.features.firings import Blocks
from pipelines.features.profile import DECILES, Kept, ShortLists
from pipelines.features.rows import Rows
from pipelines.features.texts import TokenTexts

WINDOW_BEFORE = 0.7  # share of the window before the row: a causal model has seen only that
AT_ONCE = 2048  # latents whose windows are in memory
FIRING = ("top", *(f"decile_{tenth}" for tenth in range(1, DECILES + 1)), "random")
STRATA = (*FIRING, "inactive", "hard_negative")
INACTIVE, HARD = len(FIRING), len(FIRING) + 1
REASONS = (None, "token", "neighbour")


@dataclass(eq=False)
class Wanted:
    """Rows to be shown, sorted by latent, stratum, rank; arrays [wanted].

    latent; stratum: index in STRATA; reason: index in REASONS; rank; row.
    """

    latent: npt.NDArray[np.int64]
    stratum: npt.NDArray[np.int64]
    reason: npt.NDArray[np.int64]
    rank: npt.NDArray[np.int64]
    row: npt.NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.row)

    def take(self, places: npt.NDArray[np.integer] | npt.NDArray[np.bool_]) -> Wanted:
        return Wanted(*(getattr(self, field.name)[places] for field in fields(self)))


def wanted_rows(
    kept: Kept,
    others: npt.NDArray[np.int64],
    drawn: npt.NDArray[np.int64],
    token_rows: TokenRows,
    n_rows: int,
    config: FeatureConfig,
    first: int,
    last: int,
) -> Wanted:
    """What to look at for the latents [first, last): more than is shown, see `candidates`.

    Args:
        kept: of latents that include these.
        others: the latents nearest to each [n_latents, any], -1: none.
        drawn: rows drawn from the firings of every latent [n_latents, any], -1: none.
    """
    latents = np.arange(first, last)
    lists = [_of_lists(kept, first, last)]
    if config.n_inactive:
        rows = inactive(latents, n_rows, config.n_inactive, config.seed)
        lists.append(_tried(latents, INACTIVE, 0, rows))
    if config.n_hard:
        tokens = kept.tokens[first - kept.first : last - kept.first]
        lists.append(_tried(latents, HARD, 1, by_token(tokens, token_rows)))
        lists.append(_tried(latents, HARD, 2, by_neighbour(others[first:last], drawn)))
    return _joined(lists)


def contexts(
    blocks: Blocks,
    rows: Rows,
    context_length: int,
    config: FeatureConfig,
    texts: TokenTexts,
    wanted: Wanted,
    first: int,
    last: int,
) -> pa.Table:
    """The table's part of the latents [first, last), which `wanted` is of."""
    window = min(config.window_tokens, context_length)
    begin = _begin(wanted.row, context_length, window)
    activations = _windows(blocks, wanted, begin, window, first, last)
    silent = ~activations.any(axis=1) & rows.read(wanted.row)
    fit = np.flatnonzero((wanted.stratum < INACTIVE) | silent)
    places = fit[_chosen(wanted.take(fit), config)]
    shown = wanted.take(places)
    shown.rank = _runs(shown.stratum, shown.latent)
    return _table(shown, begin[places], activations[places], rows, texts, context_length)


def _of_lists(kept: Kept, first: int, last: int) -> Wanted:
    """What `profile` has kept of the latents [first, last)."""
    parts = []
    low, high = first - kept.first, last - kept.first

    def part(lists: ShortLists, a: int, b: int, each: int, stratum: int) -> None:
        which, rank = np.nonzero(lists.used[a:b])
        row = lists.row[a:b][which, rank]
        reason = np.zeros_like(which)
        parts.append(Wanted(first + which // each, stratum + which % each, reason, rank, row))

    part(kept.top, low, high, 1, 0)
    part(kept.deciles, low * DECILES, high * DECILES, DECILES, 1)
    part(kept.random, low, high, 1, 1 + DECILES)
    return _joined(parts)


def _joined(parts: list[Wanted]) -> Wanted:
    names = [field.name for field in fields(Wanted)]
    return Wanted(*(np.concatenate([getattr(part, name) for part in parts]) for name in names))


def _tried(
    latents: npt.NDArray[np.int64], stratum: int, reason: int, rows: npt.NDArray[np.int64]
) -> Wanted:
    """Candidates [latents, any], -1: none."""
    which, rank = np.nonzero(rows >= 0)
    same = np.full_like(which, stratum), np.full_like(which, reason)
    return Wanted(latents[which], *same, rank, rows[which, rank])


def _chosen(fit: Wanted, config: FeatureConfig) -> npt.NDArray[np.int64]:
    """Places of what is shown, in the order of the table: each row once per latent and stratum.

    Of hard negatives a token's and a neighbour's take turns.
    """
    order = np.lexsort((fit.rank, fit.reason, fit.row, fit.stratum, fit.latent))
    repeated = np.ones(len(order), np.bool_)
    repeated[:1] = False
    for key in (fit.latent, fit.stratum, fit.row):
        repeated[1:] &= key[order][1:] == key[order][:-1]
    order = np.sort(order[~repeated])
    order = order[np.lexsort((fit.rank[order], fit.reason[order]))]
    # turns: the n-th of each reason before the next of any
    nth = _runs(fit.reason[order], fit.stratum[order], fit.latent[order])
    order = order[np.lexsort((fit.reason[order], nth, fit.stratum[order], fit.latent[order]))]
    place = _runs(fit.stratum[order], fit.latent[order])
    limit = np.array(
        [
            config.n_top,
            *[config.n_decile] * DECILES,
            config.n_random,
            config.n_inactive,
            config.n_hard,
        ]
    )
    return order[place < limit[fit.stratum[order]]]


def _runs(*keys: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """How many equal keys come before each one."""
    order = np.lexsort(keys)
    same = np.ones(len(order), np.bool_)
    for key in keys:
        same[1:] &= key[order][1:] == key[order][:-1]
    same[:1] = False
    starts = np.flatnonzero(~same)
    lengths = np.diff(np.append(starts, len(order)))
    count = np.empty(len(order), np.int64)
    count[order] = np.arange(len(order)) - np.repeat(starts, lengths)
    return count


def _begin(row: npt.NDArray[np.int64], context_length: int, window: int) -> npt.NDArray[np.int64]:
    """Row of the first token of each window."""
    position = row % context_length
    before = int(window * WINDOW_BEFORE)
    start = np.clip(position - before, 0, context_length - window)
    return row - position + start


def _windows(
    blocks: Blocks,
    wanted: Wanted,
    begin: npt.NDArray[np.int64],
    window: int,
    first: int,
    last: int,
) -> npt.NDArray[np.float32]:
    """Activations in each window, float32 [wanted, window]."""
    windows = np.zeros((len(wanted), window), np.float32)
    for inside, firings in blocks.all(first, last):
        here = np.flatnonzero((begin >= inside.start) & (begin < inside.stop))
        kernels.cut_windows(
            firings.starts,
            firings.row,
            firings.value,
            wanted.latent[here] - first,
            begin[here] - firings.first_row,
            here,
            windows,
        )
    return windows


def _table(
    shown: Wanted,
    begin: npt.NDArray[np.int64],
    activations: npt.NDArray[np.float32],
    rows: Rows,
    texts: TokenTexts,
    context_length: int,
) -> pa.Table:
    window = activations.shape[1]
    ids = rows.token[begin[:, None] + np.arange(window)]  # [shown, window]
    position = shown.row % context_length
    inside = shown.row - begin
    text, ends = texts.windows(ids)
    return pa.table(
        {
            "latent": shown.latent.astype(np.int32),
            "stratum": pa.array(STRATA).take(pa.array(shown.stratum)),
            "rank": shown.rank.astype(np.int16),
            "reason": pa.array(REASONS, pa.string()).take(pa.array(shown.reason)),
            "split": pa.array(["explain", "score"]).take(
                pa.array(rows.scores(shown.row).astype(np.int8))
            ),
            "activation": activations[np.arange(len(shown)), inside],
            "row": shown.row,
            "document": rows.document[shown.row],
            "context": shown.row // context_length,
            "position": position.astype(np.int32),
            "window_start": (begin % context_length).astype(np.int32),
            "token_ids": lists(pa.array(ids.reshape(-1)), ids.shape),
            "token_ends": lists(pa.array(ends.reshape(-1)), ids.shape),
            "activations": lists(pa.array(activations.reshape(-1)), activations.shape),
            "text": text,
        }
    )


def lists(flat: pa.Array, shape: tuple[int, ...]) -> pa.ListArray:
    """Equal lists [shape] of flat values."""
    offsets = np.arange(shape[0] + 1, dtype=np.int32) * shape[1]
    return pa.ListArray.from_arrays(pa.array(offsets), flat)
