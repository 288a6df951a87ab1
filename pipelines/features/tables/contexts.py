"""The examples of some latents: the rows, the text around them, and the activations in it."""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from sae_harvest.pipelines.features.building.config import FeatureConfig
from sae_harvest.pipelines.features.counting import kernels
from sae_harvest.pipelines.features.counting.candidates import (
    TokenRows,
    by_neighbour,
    by_token,
    inactive,
)
from sae_harvest.pipelines.features.counting.profile import ChosenRows, ShortLists
from sae_harvest.pipelines.features.encoding.firings import Blocks
from sae_harvest.pipelines.features.tables.folder import DECILES, FIRING, STRATA
from sae_harvest.pipelines.features.tables.rows import Rows
from sae_harvest.pipelines.features.tables.texts import TokenTexts

WINDOW_BEFORE = 0.7  # share of the window before the row: a causal model has seen only this part
AT_ONCE = 2048  # latents whose windows are in memory at a time
INACTIVE, HARD = len(FIRING), len(FIRING) + 1
REASONS = (None, "token", "neighbour")


@dataclass(eq=False)
class WantedContexts:
    """Rows to show, sorted by latent, stratum and rank."""

    latent: npt.NDArray[np.int64]
    """[wanted], number of the latent."""
    stratum: npt.NDArray[np.int64]
    """[wanted], index in STRATA."""
    reason: npt.NDArray[np.int64]
    """[wanted], index in REASONS."""
    rank: npt.NDArray[np.int64]
    """[wanted], place in the stratum, from 0."""
    row: npt.NDArray[np.int64]
    """[wanted], number of the row."""

    def __len__(self) -> int:
        return len(self.row)

    def take(self, places: npt.NDArray[np.integer] | npt.NDArray[np.bool_]) -> WantedContexts:
        return WantedContexts(*(getattr(self, field.name)[places] for field in fields(self)))


def wanted_rows(
    kept: ChosenRows,
    others: npt.NDArray[np.int64],
    drawn: npt.NDArray[np.int64],
    token_rows: TokenRows,
    n_rows: int,
    config: FeatureConfig,
    first: int,
    last: int,
) -> WantedContexts:
    """Choose the candidate contexts of the latents [first, last); see `candidates`.

    There are more candidates than contexts in the table.

    Args:
        kept: rows chosen for latents that include these.
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
    wanted: WantedContexts,
    first: int,
    last: int,
) -> pa.Table:
    """Make the part of the table for the latents [first, last), those of `wanted`."""
    window = min(config.window_tokens, context_length)
    begin = _begin(wanted.row, context_length, window)
    firing = wanted.stratum < INACTIVE
    activations, fires = _windows(blocks, wanted, firing, begin, window, first, last)
    fit = np.flatnonzero(firing | (~fires & rows.read(wanted.row)))
    places = fit[_chosen(wanted.take(fit), config)]
    shown = wanted.take(places)
    shown.rank = _before(shown.latent * len(STRATA) + shown.stratum)
    found = np.zeros((len(places), window), np.float32)
    found[firing[places]] = activations[(np.cumsum(firing) - 1)[places[firing[places]]]]
    return _table(shown, begin[places], found, rows, texts, context_length)


def _of_lists(kept: ChosenRows, first: int, last: int) -> WantedContexts:
    """Return the contexts that `profile` chose for the latents [first, last)."""
    parts = []
    low, high = first - kept.first, last - kept.first

    def part(lists: ShortLists, a: int, b: int, each: int, stratum: int) -> None:
        which, rank = np.nonzero(lists.used[a:b])
        row = lists.row[a:b][which, rank]
        reason = np.zeros_like(which)
        parts.append(
            WantedContexts(first + which // each, stratum + which % each, reason, rank, row)
        )

    part(kept.top, low, high, 1, 0)
    part(kept.deciles, low * DECILES, high * DECILES, DECILES, 1)
    part(kept.random, low, high, 1, 1 + DECILES)
    return _joined(parts)


def _joined(parts: list[WantedContexts]) -> WantedContexts:
    names = [field.name for field in fields(WantedContexts)]
    return WantedContexts(
        *(np.concatenate([getattr(part, name) for part in parts]) for name in names)
    )


def _tried(
    latents: npt.NDArray[np.int64], stratum: int, reason: int, rows: npt.NDArray[np.int64]
) -> WantedContexts:
    """Make candidates from rows [latents, any], -1: none."""
    which, rank = np.nonzero(rows >= 0)
    same = np.full_like(which, stratum), np.full_like(which, reason)
    return WantedContexts(latents[which], *same, rank, rows[which, rank])


def _chosen(fit: WantedContexts, config: FeatureConfig) -> npt.NDArray[np.int64]:
    """Choose the contexts to show, in the order of the table: rows once per latent and stratum.

    Hard negatives from a token and from a neighbour take turns.
    """
    if not len(fit):
        return np.empty(0, np.int64)
    lists, reasons = fit.latent * len(STRATA) + fit.stratum, len(REASONS)
    ranks = int(fit.rank.max()) + 1
    preferred, same = fit.reason * ranks + fit.rank, lists * (int(fit.row.max()) + 1) + fit.row
    order = np.lexsort((preferred, same))
    order = order[np.diff(same[order], prepend=-1) > 0]
    order = order[np.argsort(lists[order] * (reasons * ranks) + preferred[order])]
    # turns: the n-th of each reason before the n + 1-th of any reason
    turn = _before(lists[order] * reasons + fit.reason[order]) * reasons + fit.reason[order]
    order = order[np.argsort(lists[order] * (int(turn.max()) + 1) + turn)]
    limits = [config.n_top, *[config.n_decile] * DECILES]
    limits += [config.n_random, config.n_inactive, config.n_hard]
    return order[_before(lists[order]) < np.array(limits)[fit.stratum[order]]]


def _before(key: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Count the equal keys before each key; equal keys must be adjacent."""
    starts = np.flatnonzero(np.diff(key, prepend=-1))
    return np.arange(len(key)) - np.repeat(starts, np.diff(np.append(starts, len(key))))


def _begin(row: npt.NDArray[np.int64], context_length: int, window: int) -> npt.NDArray[np.int64]:
    """Return the row of the first token of each window."""
    position = row % context_length
    before = int(window * WINDOW_BEFORE)
    start = np.clip(position - before, 0, context_length - window)
    return row - position + start


def _windows(
    blocks: Blocks,
    wanted: WantedContexts,
    firing: npt.NDArray[np.bool_],
    begin: npt.NDArray[np.int64],
    window: int,
    first: int,
    last: int,
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.bool_]]:
    """Return activations in the windows of `firing` contexts, float32 [firing, window].

    For the other contexts, return whether the latent fires anywhere in their windows, [wanted].
    """
    windows, fires = np.zeros((int(firing.sum()), window), np.float32), firing.copy()
    at = np.cumsum(firing) - 1
    for inside, firings in blocks.all(first, last):
        here = (begin >= inside.start) & (begin < inside.stop)
        some, starts, row = np.flatnonzero(here & firing), firings.starts, firings.row
        where = wanted.latent[some] - first, begin[some] - firings.first_row
        kernels.cut_windows(starts, row, firings.value, *where, at[some], window, windows)
        some = np.flatnonzero(here & ~firing)
        where = wanted.latent[some] - first, begin[some] - firings.first_row
        fires[some] = kernels.fires_within(starts, row, *where, window)
    return windows, fires


def _table(
    shown: WantedContexts,
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
    """Make lists of equal length, of `shape`, from flat values."""
    offsets = np.arange(shape[0] + 1, dtype=np.int32) * shape[1]
    return pa.ListArray.from_arrays(pa.array(offsets), flat)
