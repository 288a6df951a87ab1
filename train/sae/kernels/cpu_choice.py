"""Choice of latents on the CPU: each thread computes tiles of scores and scans them itself.

A tile is small enough to stay in the thread's cache.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sae_harvest.train.sae.kernels.by_rows import by_rows
from sae_harvest.train.sae.kernels.cpu_low import Factors
from sae_harvest.train.sae.kernels.selection_jit import (
    LEAST,
    append_above,
    finish_largest,
    merge_largest,
    room_for,
)

LATENTS = 1024  # latents of a tile
MIN_ROOM = 64  # initial room of a row for latents above their floor


def largest(factors: Factors, bias: Tensor, count: int) -> Tensor:
    """Find the latents with the `count` largest scores: int32 [batch, count], increasing."""
    return _extreme(factors, bias, count, (1,))[0]


def both_ends(factors: Factors, bias: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Find the latents with the `count` largest and the `count` smallest scores of each row.

    Both are int32 [batch, count], increasing.
    """
    top, bottom = _extreme(factors, bias, count, (1, -1))
    return top, bottom


def _extreme(factors: Factors, bias: Tensor, count: int, signs: tuple[int, ...]) -> list[Tensor]:
    """Find the latents with the largest scores after multiplication by each sign."""
    # a latent that is not finite is always chosen: its exact value shows it
    finite = (bias + factors.spread).isfinite()
    offsets = [(sign * bias).where(finite, torch.inf).numpy() for sign in signs]
    scales = [(sign * factors.scale).numpy() for sign in signs]
    out = [np.empty((len(factors.rows), count), np.int32) for _ in signs]

    def choose(rows: slice) -> None:
        some, room = rows.stop - rows.start, room_for(count)
        row_scale = factors.row_scale[rows].numpy()
        lists = [
            (
                *np.empty((2, some, room), np.int32),
                np.zeros(some, np.int64),
                np.full(some, LEAST, np.int32),
            )
            for _ in signs
        ]
        for latents, scores in _tiles(factors, rows):
            for scale, offset, mine in zip(scales, offsets, lists, strict=True):
                some_latents = scale[latents], offset[latents], latents.start
                merge_largest(scores, row_scale, *some_latents, count, *mine)
        for mine, chosen in zip(lists, out, strict=True):
            finish_largest(*mine, chosen[rows])

    by_rows(len(factors.rows), choose)
    return [torch.from_numpy(chosen) for chosen in out]


def above(factors: Factors, least: Tensor) -> Tensor:
    """Find the latents whose score may reach `least`, float32 [n_latents]; see `choose_above`."""
    scale, spread, floor = factors.scale.numpy(), factors.spread.numpy(), least.numpy()

    def choose(rows: slice) -> Any:
        out = np.full((rows.stop - rows.start, MIN_ROOM), -1, np.int32)
        found = np.zeros(len(out), np.int64)
        row_scale, doubt = factors.row_scale[rows].numpy(), factors.doubt[rows].numpy()
        for latents, scores in _tiles(factors, rows):
            tile = (scores, row_scale, scale[latents], floor[latents], doubt, spread[latents])
            needed = np.empty_like(found)
            append_above(*tile, latents.start, out, found, needed)
            if needed.max() > out.shape[1]:  # repeat with room for all
                more = 2 * int(needed.max()) - out.shape[1]
                out = np.pad(out, ((0, 0), (0, more)), constant_values=-1)
                append_above(*tile, latents.start, out, found, needed)
            found = needed
        return out[:, : found.max(initial=1)]

    parts = by_rows(len(factors.rows), choose)
    width = max((part.shape[1] for part in parts), default=1)
    out = np.full((len(factors.rows), width), -1, np.int32)
    first = 0
    for part in parts:
        out[first : first + len(part), : part.shape[1]] = part
        first += len(part)
    return torch.from_numpy(out)


def _tiles(factors: Factors, rows: slice) -> Iterator[tuple[slice, Any]]:
    """Yield slices of the latents, and their scores for some rows, [rows, latents]."""
    scratch = torch.empty((rows.stop - rows.start) * LATENTS, dtype=torch.int32)
    for first in range(0, len(factors.latents), LATENTS):
        latents = slice(first, first + LATENTS)
        yield latents, factors.product(rows, latents, scratch).numpy()
