"""The largest scores, found from the summaries of `triton_scores`.

The `count` largest scores of a row are found exactly, although only two of each group of 32 are
known. Call the known scores candidates, and let T be the count-th largest candidate. If an unknown
score is above T, both candidates of its group are above it, and so above T. So a group can hide
such a score only if its second candidate is among the `count` largest. The scores of all 32 members
of these few groups are computed again and merged.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sae_harvest.train.sae.kernels.triton_low import GroupedLow
from sae_harvest.train.sae.kernels.triton_scores import MIN_KEY, group_maxima, ordered

KEYS_BYTES = 1 << 30  # size of the keys of one chunk of rows
MIN_CLASSES = 1024  # classes of a row's keys, at least
MIN_ROOM = 128  # survivors of a row, at least
GROUPS_A_CANDIDATE = 8  # with fewer groups, too many groups would be computed again
SCORES_BYTES = 256 << 20  # size of the scores of one chunk of rows, in `choose_by_rows`
MIN_PACKED = tl.constexpr(-(2**63))


@triton.jit
def _reached_by(keys: tl.tensor, count: tl.tensor, LAST_BIT: tl.constexpr) -> Any:
    """Find the largest int32, with zero bits below LAST_BIT, that `count` keys reach."""
    shifted = (keys ^ MIN_KEY).to(tl.uint32, bitcast=True)  # in the order of the keys
    floor = tl.full((), 0, tl.uint32)
    bit = tl.full((), 1 << 31, tl.uint32)
    for _ in tl.range(0, 32 - LAST_BIT):
        trial = floor | bit
        bit = bit >> 1
        floor = tl.where(tl.sum((shifted >= trial).to(tl.int32), 0) >= count, trial, floor)
    return floor.to(tl.int32, bitcast=True) ^ MIN_KEY


@triton.jit
def _take(
    keys: tl.tensor,
    found: tl.tensor,
    places: tl.tensor,
    width: tl.tensor,
    floor: tl.tensor,
    ties: tl.tensor,
    CLASSES: tl.constexpr,
    ROOM: tl.constexpr,
) -> Any:
    """Write the keys above the floor and the first `ties` equal to it; return their number."""
    lane = tl.arange(0, CLASSES)
    taken = tl.full((), 0, tl.int32)
    equal = tl.full((), 0, tl.int32)
    for first in tl.range(0, width, CLASSES):
        here = first + lane < width
        key = tl.load(keys + first + lane, mask=here, other=MIN_KEY)
        same = ((key == floor) & here).to(tl.int32)
        among = equal + tl.cumsum(same, 0)  # number of equal keys up to this one
        keep = ((key > floor) & here) | ((same > 0) & (among <= ties))
        slot = taken + tl.cumsum(keep.to(tl.int32), 0) - 1
        tl.store(found + slot, key, mask=keep & (slot < ROOM))
        tl.store(places + slot, first + lane, mask=keep & (slot < ROOM))
        taken += tl.sum(keep.to(tl.int32), 0)
        equal += tl.sum(same, 0)
    slot = tl.arange(0, ROOM)
    tl.store(places + slot, -1, mask=slot >= taken)
    return taken


@triton.jit
def _survivors_kernel(
    keys: tl.tensor,
    found: tl.tensor,
    places: tl.tensor,
    width: tl.tensor,
    count: tl.tensor,
    CLASSES: tl.constexpr,
    ROOM: tl.constexpr,
) -> None:
    """List the keys of one row that may be among its `count` largest, and their places, then -1.

    At least `count` keys, and few more, reach the count-th largest of the maxima of disjoint
    classes. If too many keys are equal to it (as in a row of zeros), the row's exact count-th
    largest key is found, and of the keys equal to it, the lower places are chosen.
    """
    row = tl.program_id(0).to(tl.int64)
    keys += row * width
    found += row * ROOM
    places += row * ROOM
    lane = tl.arange(0, CLASSES)
    best = tl.full((CLASSES,), MIN_KEY, tl.int32)
    for first in tl.range(0, width, CLASSES):
        best = tl.maximum(best, tl.load(keys + first + lane, mask=first + lane < width, other=best))
    floor = _reached_by(best, count, 8)
    taken = _take(keys, found, places, width, floor, width, CLASSES, ROOM)
    if taken > ROOM:
        bits = tl.full((), 0, tl.uint32)
        bit = tl.full((), 1 << 31, tl.uint32)
        above = tl.full((), 0, tl.int32)
        for _ in tl.range(0, 32):
            trial = bits | bit
            bit = bit >> 1
            middle = trial.to(tl.int32, bitcast=True) ^ MIN_KEY
            reached = tl.full((), 0, tl.int32)
            for first in tl.range(0, width, CLASSES):
                here = first + lane < width
                key = tl.load(keys + first + lane, mask=here, other=MIN_KEY)
                reached += tl.sum(((key >= middle) & here).to(tl.int32), 0)
            above = tl.where(reached >= count, above, reached)
            bits = tl.where(reached >= count, trial, bits)
        floor = bits.to(tl.int32, bitcast=True) ^ MIN_KEY
        # `above` counts the keys above the floor, from the last trial that too few reached
        _take(keys, found, places, width, floor, count - above, CLASSES, ROOM)


@triton.jit
def _packed(key: tl.tensor, latent: tl.tensor) -> Any:
    """Pack into int64 that order by key, and then by latent, the lower first."""
    return (key.to(tl.int64) << 32) | (0x7FFFFFFF - latent).to(tl.int64)


@triton.jit
def _count_th(packed: tl.tensor, count: tl.tensor) -> Any:
    """Find the count-th largest of `packed`, int64 [any]."""
    shifted = (packed ^ MIN_PACKED).to(tl.uint64, bitcast=True)  # in the same order
    floor = tl.full((), 0, tl.uint64)
    bit = tl.full((), 1 << 63, tl.uint64)
    for _ in tl.range(0, 64):
        trial = floor | bit
        bit = bit >> 1
        floor = tl.where(tl.sum((shifted >= trial).to(tl.int32), 0) >= count, trial, floor)
    return floor.to(tl.int64, bitcast=True) ^ MIN_PACKED


@triton.jit
def _settle_kernel(
    found: tl.tensor,
    places: tl.tensor,
    keys: tl.tensor,
    centred: tl.tensor,
    low: tl.tensor,
    inverse: tl.tensor,
    scales: tl.tensor,
    offsets: tl.tensor,
    out: tl.tensor,
    n_latents: tl.tensor,
    groups: tl.tensor,
    count: tl.tensor,
    DEPTH: tl.constexpr,
    FP8: tl.constexpr,
    ROOM: tl.constexpr,
) -> None:
    """Find the `count` largest of one row; compute groups again that may hide some."""
    row = tl.program_id(0).to(tl.int64)
    slot = tl.arange(0, ROOM)
    place = tl.load(places + row * ROOM + slot)
    key = tl.load(found + row * ROOM + slot, mask=place >= 0, other=MIN_KEY)
    group = place >> 1
    packed = _packed(key, (31 - (key & 31)) * groups + group)
    packed = tl.where(place < 0, MIN_PACKED, packed)
    last = _count_th(packed, count)
    hiding = (place >= 0) & (place % 2 == 1) & (packed >= last)
    rank = tl.cumsum(hiding.to(tl.int32), 0)
    member = tl.arange(0, 32)
    share = tl.load(inverse + row)
    for number in tl.range(1, tl.sum(hiding.to(tl.int32), 0) + 1):
        this = tl.max(tl.where(hiding & (rank == number), group, 0), 0)
        position = (this // 4 * 128 + this % 4 + member * 4).to(tl.int64)
        total = tl.zeros((32, 64), tl.float32)
        for first in tl.range(0, DEPTH, 64):
            column = first + tl.arange(0, 64)
            w = tl.load(low + position[:, None] * DEPTH + column[None, :]).to(tl.float32)
            x = tl.load(centred + row * DEPTH + column).to(tl.float32)
            total += w * x[None, :]
        score = tl.sum(total, 1)  # [32]
        latent = member * groups + this
        offset = tl.load(offsets + position)
        score = score * tl.load(scales + position) + offset * share if FP8 else score + offset
        known = keys + (row * groups + this) * 2  # the two candidates, already in the list
        first_known, second_known = 31 - (tl.load(known) & 31), 31 - (tl.load(known + 1) & 31)
        new = _packed((ordered(score) & -32) | (31 - member), latent)
        new = tl.where((member == first_known) | (member == second_known), MIN_PACKED, new)
        free = packed < last  # places whose keys are not among the `count` largest
        nth = tl.minimum(tl.cumsum(free.to(tl.int32), 0) - 1, 31)
        packed = tl.where(free, tl.gather(new, tl.maximum(nth, 0), 0), packed)
        packed = tl.where(free & (tl.cumsum(free.to(tl.int32), 0) > 32), MIN_PACKED, packed)
        last = _count_th(packed, count)
    keep = packed >= last
    chosen = 0x7FFFFFFF - (packed & 0x7FFFFFFF).to(tl.int32)
    target = out + row * count + tl.cumsum(keep.to(tl.int32), 0) - 1
    # in a row of NaN, latents that don't exist may be chosen
    tl.store(target, tl.minimum(chosen, n_latents - 1), mask=keep)


def choose_by_groups(
    short: Tensor, scale: Tensor, low: GroupedLow, bias: Tensor, count: int
) -> Tensor:
    """Find the latents with the `count` largest scores of each row: int32 [rows, count].

    Args:
        short, scale: [rows, depth] and float32 [rows], from `triton_low.shorten`.
        bias: float32 [n_latents].
    """
    out = torch.empty(len(short), count, dtype=torch.int32, device=short.device)
    room = max(MIN_ROOM, triton.next_power_of_2(count + count // 2 + 32))
    classes = max(MIN_CLASSES, triton.next_power_of_2(4 * count))
    inverse, offsets = scale.reciprocal(), low.by_position(bias, -torch.inf)
    step = max(128, KEYS_BYTES // (8 * low.groups) // 128 * 128)
    for first in range(0, len(short), step):
        part = slice(first, first + step)
        rows = len(short[part])
        keys = group_maxima(short[part], inverse[part], low, offsets)
        found = torch.empty(rows, room, dtype=torch.int32, device=short.device)
        places = torch.empty_like(found)
        _survivors_kernel[(rows,)](
            keys, found, places, 2 * low.groups, count, CLASSES=classes, ROOM=room
        )
        _settle_kernel[(rows,)](
            found,
            places,
            keys,
            short[part],
            low.values,
            inverse[part],
            low.scales,
            offsets,
            out[part],
            low.n_latents,
            low.groups,
            count,
            DEPTH=short.shape[1],
            FP8=low.fp8,
            ROOM=room,
            num_warps=max(1, min(4, room // 256)),
        )
    return out


def choose_by_rows(
    short: Tensor, scale: Tensor, low: GroupedLow, bias: Tensor, count: int
) -> Tensor:
    """Do `choose_by_groups` from all scores of a row, for few latents or a large count.

    Of equal scores, any may be chosen.
    """
    latents = low.latents()
    there = latents < low.n_latents
    offset = low.by_position(bias, -torch.inf)
    weight = low.values.to(torch.bfloat16)
    step = max(1, SCORES_BYTES // (4 * len(weight)))
    chosen = []
    for x, factor in zip(short.split(step), scale.split(step), strict=True):
        scores = (x.to(torch.bfloat16) @ weight.T).float()  # [chunk, positions]
        scores = scores.mul_(low.scales).mul_(factor.unsqueeze(1)).add_(offset)
        scores.masked_fill_(~there, -torch.inf)  # also in a row of NaN
        chosen.append(latents[scores.topk(count, dim=1).indices].int())
    return torch.cat(chosen)


def group_choice_pays(low: GroupedLow, count: int) -> bool:
    """Whether `choose_by_groups` is faster: if few of a row's largest scores share a group."""
    return low.groups >= GROUPS_A_CANDIDATE * count
