"""Loss against compute: the lower envelope of the training curves of several sizes.

All sizes see the same number of rows, so small ones end at less compute. The envelope at a compute
C is the least loss that any run has reached by then. It has a point only where a run lowers it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from sae_harvest.train.scaling.laws import Array
from sae_harvest.train.scaling.points import RunPoint

PER_OCTAVE = 2  # points of the envelope per doubling of compute
WINDOW = 0.5  # octaves of compute over which a point of a curve is smoothed
MIN_STEPS = 3  # in that window


@dataclass(frozen=True)
class Envelope:
    """The least loss that runs reach at each compute."""

    flops: Array
    """Compute in FLOPs, [points]."""
    fvu: Array
    """FVU of the best size at each point, [points]."""
    best: Array
    """n_latents of the best size, int [points]."""
    inner: Array
    """Whether the best size is neither the smallest nor the largest, bool [points].

    Laws leave other points out, since a size that was not trained might be better there."""


def envelope(points: Sequence[RunPoint]) -> Envelope:
    """Return the envelope of runs at one k. Seeds of the same size are averaged (ln FVU)."""
    steps = np.arange(
        np.floor(np.log2(min(curve_flops(point)[0] for point in points)) * PER_OCTAVE),
        np.log2(max(point.flops for point in points)) * PER_OCTAVE,
    )
    grid = 2.0 ** (steps / PER_OCTAVE)  # FLOPs
    by_size: dict[int, list[Array]] = defaultdict(list)
    for point in points:
        by_size[point.n_latents].append(smooth(curve_flops(point), point.curve_fvu, grid))
    sizes = np.array(sorted(by_size))
    # a size counts where all of its seeds have values: [sizes, grid]
    logs = np.stack([np.mean(by_size[int(n)], axis=0) for n in sizes])
    logs = np.where(np.isnan(logs), np.inf, logs)
    best = logs.argmin(0)  # [grid]
    least = logs.min(0)
    before = np.minimum.accumulate(np.concatenate(([np.inf], least[:-1])))
    sets = least < before  # [grid]
    inner = (best > 0) & (best < len(sizes) - 1)
    return Envelope(grid[sets], np.exp(least[sets]), sizes[best[sets]], inner[sets])


def curve_flops(point: RunPoint) -> Array:
    """Return the compute of each value of a run's curve; a batch is measured before its step."""
    seen = point.curve_tokens - np.diff(point.curve_tokens, prepend=0.0)
    return np.asarray(np.maximum(seen, 1.0) * point.flops_per_token)


def smooth(flops: Array, fvu: Array, grid: Array) -> Array:
    """Return ln FVU of a curve at each compute of a grid; NaN where it has too few steps.

    Fits a line through the logarithms of the steps in the window.
    """
    found = np.full(len(grid), np.nan)
    logs, values = np.log2(flops), np.log(np.maximum(fvu, 1e-12))
    for index, centre in enumerate(np.log2(grid)):
        near = np.abs(logs - centre) <= WINDOW / 2
        if near.sum() >= MIN_STEPS and logs[0] <= centre <= logs[-1]:
            found[index] = np.polyfit(logs[near] - centre, values[near], 1)[1]
    return found
