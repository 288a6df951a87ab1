"""Compiled loops that choose latents by low-precision scores.

Scores come in tiles, some rows by some latents, so that they are still in the cache after the
product. The loops take numpy arrays, and each runs in one thread; `train.sae.kernels.cpu_choice`
runs several.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from sae_harvest.train.sae.kernels.jit import FAST, njit

BLOCK = 64  # latents that share one maximum: a few vector registers
GROUP = 16  # latents that share one maximum in the first tile
LEAST = -(2**31)  # least int32; no number has this key


@njit(**FAST)
def _count_at_least(keys: Any, threshold: Any) -> Any:
    """Count the keys that are at least `threshold`."""
    total = np.int32(0)
    for i in range(keys.shape[0]):
        total += np.int32(keys[i] >= threshold)
    return total


@njit(**FAST)
def _threshold(keys: Any, count: int, low: Any) -> Any:
    """Find the largest int32, at least `low`, that `count` keys reach, by bisection."""
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
    """Convert a float32 to an int32 that has the same order."""
    bits = np.float32(value).view(np.int32)
    return np.int32(bits ^ ((bits >> np.int32(31)) & np.int32(2**31 - 1)))


@njit(**FAST)
def _fill(scores: Any, scale: Any, factor: Any, offset: Any, fresh: Any, maxima: Any) -> None:
    """Write a row's keys by block, [blocks, BLOCK], and the largest key of each block."""
    for block in range(maxima.shape[0]):
        # slices, indexed from zero: otherwise the compiler gathers numbers one by one
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
    """Find a key that `count` of a row's first keys exceed, or LEAST if there are too few."""
    groups = tops.shape[0]
    if groups < count:
        return np.int32(LEAST)
    tops[:] = fresh[:groups]
    for start in range(groups, groups * GROUP, groups):
        some = fresh[start : start + groups]
        for group in range(groups):
            tops[group] = max(tops[group], some[group])
    # `count` groups reach this key
    return np.int32(_threshold(tops, count, LEAST + 1) - 1)


@njit(**FAST)
def _append(fresh: Any, first: int, floor: Any, keys: Any, places: Any, found: int) -> int:
    """Append a block's keys above `floor`, and their places from `first` on; return the count."""
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
    """Move the `count` largest to the front, in order; of equal keys, keep the first ones.

    Returns:
        The least key that stays.
    """
    last = _threshold(keys[:found], count, floor)
    ties = count - _count_at_least(keys[:found], np.int64(last) + 1)
    taken = 0
    for i in range(found):
        # without branches, which are often mispredicted: keys that don't stay are overwritten
        key, place = keys[i], places[i]
        keys[taken] = key
        places[taken] = place
        tie = int(key == last) & int(ties > 0)
        ties -= tie
        taken += int(key > last) + tie
    return last


def room_for(count: int) -> int:
    """Return the room of a row, in latents, during the search for its largest."""
    return 2 * count + BLOCK


@njit(**FAST)
def merge_largest(
    scores: Any, factors: Any, scale: Any, offset: Any, before: int, count: int,
    keys: Any, places: Any, found: Any, floors: Any,
) -> None:  # fmt: skip
    """Add the latents of a tile that may be among the `count` largest of each row.

    A pre-activation is scores[row, i] * scale[i] * factors[row] + offset[i], for the latent
    before + i; tiles come in the order of latents.

    Args:
        scores: int32 or float32 [rows, tile]. factors: float32 [rows], not negative.
        scale, offset: float32 [tile]; no pre-activation is NaN.
        keys, places: int32 [rows, room_for(count)], in order of index.
        found: int64 [rows], the number of latents in each row.
        floors: int32 [rows], a key must exceed its row's floor; LEAST at first.
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
    """Write the `count` largest of each row into `out`, int32 [rows, count], in order of index.

    Of equal keys, the lower index is chosen.
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
    """Append a row's latents that may reach their floor, as far as the room lasts."""
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
    """Append a tile's latents that may reach their floor, in each row.

    Args:
        scores, factors, scale, before: as for `merge_largest`.
        least: float32 [tile], the floor without the bias.
        doubt, spread: float32 [rows] and [tile]; their product bounds the error of a value.
            A row with a doubt that is not finite gets latent 0 only.
        places: int32 [rows, room]. found: int64 [rows], the number of latents in each row.
        needed: int64 [rows], written: the room that a row needs; it may exceed `room`.
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
