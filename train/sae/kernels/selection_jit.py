"""Compiled loops that choose latents by low-precision scores.

Scores come a tile at a time, some rows by some latents, so that they are read where the product
left them, in the cache. Only loops over numpy arrays live here, each of one thread;
`train.sae.kernels.cpu_choice` runs several.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from sae_harvest.train.sae.kernels.jit import FAST, njit

BLOCK = 64  # latents whose maximum stands for them: a few vector registers
GROUP = 16  # latents whose maximum stands for them in the first tile
LEAST = -(2**31)  # of int32; the key of no number


@njit(**FAST)
def _count_at_least(keys: Any, threshold: Any) -> Any:
    """Count the keys that are at least `threshold`."""
    total = np.int32(0)
    for i in range(keys.shape[0]):
        total += np.int32(keys[i] >= threshold)
    return total


@njit(**FAST)
def _threshold(keys: Any, count: int, low: Any) -> Any:
    """The largest int32 that at least `count` of the keys reach, by bisection; `low` or more."""
    largest = np.int32(low)
    for i in range(keys.shape[0]):
        largest = max(largest, keys[i])
    least, most = np.int64(low), np.int64(largest)
    while least < most:
        middle = (least + most + 1) >> 1
        if _count_at_least(keys, np.int32(middle)) >= count:
            least = middle
        else:
            most = middle - 1
    return np.int32(least)


@njit(**FAST)
def _key(value: Any) -> Any:
    """An int32 that orders as the float32 does."""
    bits = np.float32(value).view(np.int32)
    return np.int32(bits ^ ((bits >> np.int32(31)) & np.int32(2**31 - 1)))


@njit(**FAST)
def _fill(scores: Any, scale: Any, factor: Any, offset: Any, fresh: Any, maxima: Any) -> None:
    """Keys of a row's pre-activations by block, [blocks, BLOCK], and the largest of each block."""
    for block in range(maxima.shape[0]):
        # slices, counted from zero: otherwise their numbers are gathered one by one
        first, last = block * BLOCK, min((block + 1) * BLOCK, scores.shape[0])
        here, steps, offsets = scores[first:last], scale[first:last], offset[first:last]
        out = fresh[block]
        largest = np.int32(LEAST)
        for i in range(len(here)):
            key = _key(np.float32(here[i]) * steps[i] * factor + offsets[i])
            out[i] = key
            largest = max(largest, key)
        maxima[block] = largest


@njit(**FAST)
def _first_floor(fresh: Any, count: int, tops: Any) -> Any:
    """A key that at least `count` of a row's first keys are above, or LEAST if there are few."""
    groups = tops.shape[0]
    if groups < count:
        return np.int32(LEAST)
    tops[:] = fresh[:groups]
    for start in range(groups, groups * GROUP, groups):
        some = fresh[start : start + groups]
        for group in range(groups):
            tops[group] = max(tops[group], some[group])
    # `count` of the groups reach this
    return np.int32(_threshold(tops, count, LEAST + 1) - 1)


@njit(**FAST)
def _append(fresh: Any, first: int, floor: Any, keys: Any, places: Any, found: int) -> int:
    """Appends a block's keys above `floor` and their places from `first` on; the new count."""
    mask = np.uint64(0)
    for i in range(BLOCK):
        mask |= np.uint64(fresh[i] > floor) << np.uint64(i)
    while mask:
        lowest = mask & (~mask + np.uint64(1))
        place = (np.float64(lowest).view(np.int64) >> 52) - 1023  # its exponent
        keys[found] = fresh[place]
        places[found] = first + place
        found += 1
        mask ^= lowest
    return found


@njit(**FAST)
def _keep_largest(keys: Any, places: Any, found: int, count: int, floor: Any) -> Any:
    """Moves the `count` largest to the front, in order; of equals, the first ones stay.

    Returns:
        the least of them.
    """
    last = _threshold(keys[:found], count, floor)
    ties = count - _count_at_least(keys[:found], np.int64(last) + 1)
    taken = 0
    for i in range(found):
        # without branches, which would often be guessed wrong: what isn't kept is written over
        key, place = keys[i], places[i]
        keys[taken] = key
        places[taken] = place
        tie = int(key == last) & int(ties > 0)
        ties -= tie
        taken += int(key > last) + tie
    return last


def room_for(count: int) -> int:
    """Latents that a row has room for while its largest are looked for."""
    return 2 * count + BLOCK


@njit(**FAST)
def merge_largest(
    scores: Any, factors: Any, scale: Any, offset: Any, before: int, count: int,
    keys: Any, places: Any, found: Any, floors: Any,
) -> None:  # fmt: skip
    """Adds a tile of latents to those that may be among the `count` largest of each row.

    A pre-activation is scores[row, i] * scale[i] * factors[row] + offset[i], for the latent
    before + i; tiles come in the order of latents.

    Args:
        scores: int32 or float32 [rows, tile]. factors: float32 [rows], not negative.
        scale, offset: float32 [tile]; no pre-activation is NaN.
        keys, places: int32 [rows, room_for(count)], in order of index.
        found: int64 [rows], how many are there.
        floors: int32 [rows], which a key must exceed; LEAST at first.
    """
    rows, tile = scores.shape
    blocks = (tile + BLOCK - 1) // BLOCK
    fresh = np.full((blocks, BLOCK), LEAST, np.int32)
    maxima = np.empty(blocks, np.int32)
    tops = np.empty(tile // GROUP, np.int32)
    for row in range(rows):
        _fill(scores[row], scale, factors[row], offset, fresh, maxima)
        here, there, size, floor = keys[row], places[row], found[row], floors[row]
        if before == 0:
            floor = _first_floor(fresh.ravel(), count, tops)
        for block in range(blocks):
            if maxima[block] <= floor:
                continue
            if size + BLOCK > here.shape[0]:
                floor = _keep_largest(here, there, size, count, floor)
                size = count
            size = _append(fresh[block], before + block * BLOCK, floor, here, there, size)
        found[row], floors[row] = size, floor


@njit(**FAST)
def finish_largest(keys: Any, places: Any, found: Any, floors: Any, out: Any) -> None:
    """The `count` largest of each row as int32 [rows, count] `out`, in order of index.

    Among equals, those of lower index are taken.
    """
    count = out.shape[1]
    for row in range(out.shape[0]):
        if found[row] > count:
            _keep_largest(keys[row], places[row], found[row], count, floors[row])
        out[row] = places[row, :count]


@njit(**FAST)
def _above(score: Any, scale: Any, factor: Any, slack: Any, least: Any) -> Any:
    """Whether a pre-activation may reach its floor, or is NaN."""
    return not (np.float32(score) * scale * factor + slack < least)


@njit(**FAST)
def _list_above(
    scores: Any, scale: Any, factor: Any, least: Any, doubt: Any, spread: Any,
    before: int, places: Any, found: int,
) -> int:  # fmt: skip
    """Appends a row's latents that may reach their floor, as far as there is room."""
    room = places.shape[0]
    for first in range(0, scores.shape[0], BLOCK):
        last = min(first + BLOCK, scores.shape[0])
        here, steps = scores[first:last], scale[first:last]
        floors, widths = least[first:last], spread[first:last]
        total = np.int32(0)
        for i in range(len(here)):
            total += np.int32(_above(here[i], steps[i], factor, doubt * widths[i], floors[i]))
        if total == 0:
            continue
        for i in range(len(here)):
            if _above(here[i], steps[i], factor, doubt * widths[i], floors[i]):
                if found < room:
                    places[found] = before + first + i
                found += 1
    return found


@njit(**FAST)
def append_above(
    scores: Any, factors: Any, scale: Any, least: Any, doubt: Any, spread: Any,
    before: int, places: Any, found: Any, needed: Any,
) -> None:  # fmt: skip
    """Appends a tile's latents that may reach their floor to those of each row so far.

    Args:
        scores, factors, scale, before: as for `merge_largest`.
        least: float32 [tile], the floor without the bias.
        doubt: float32 [rows], times spread, float32 [tile]: how far off a value may be.
            A row whose doubt is not finite has latent 0 only.
        places: int32 [rows, room]. found: int64 [rows], how many are there.
        needed: int64 [rows], written: how many there are now; more than `room` did not fit.
    """
    for row in range(found.shape[0]):
        if np.isfinite(doubt[row]):
            needed[row] = _list_above(
                scores[row], scale, factors[row], least, doubt[row], spread,
                before, places[row], found[row],
            )  # fmt: skip
        else:
            places[row, 0] = 0
            needed[row] = 1
