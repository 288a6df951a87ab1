"""Gradients of pairs on the GPU, summed by latent.

The pairs are sorted by latent (`train.sae.kernels.triton_sort`), and one program adds the pairs of
a latent. A latent with more than `LONG` pairs is split into pieces of `LONG` pairs; a second
program adds the sums of the pieces in order. There are no atomics, so that results are the same
bits each time. Nothing waits for the host: a grid has the largest size that can be needed, and
programs without work end at once.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sae_harvest.train.sae.kernels import Gradients, Pairs
from sae_harvest.train.sae.kernels.triton_sort import Sorted

LONG = 256  # pairs that one program adds up
TILE_ELEMENTS = 4096  # numbers of gathered rows that a program holds


@triton.jit
def _add_pairs(
    first: tl.tensor,
    last: tl.tensor,
    places: tl.tensor,
    rows: tl.tensor,
    values: tl.tensor,
    gain: tl.tensor,
    extra: tl.tensor,
    slopes: tl.tensor,
    error: tl.tensor,
    centred: tl.tensor,
    w: tl.tensor,
    d_out: tl.tensor,
    d_in: tl.tensor,
    GAIN: tl.constexpr,
    EXTRA: tl.constexpr,
    SLOPES: tl.constexpr,
    DECODER: tl.constexpr,
    PAIRS: tl.constexpr,
    OUT: tl.constexpr,
    IN: tl.constexpr,
) -> Any:
    """Sum over some pairs of one latent: dec [OUT], not projected, enc [IN], bias, live pairs."""
    out, column = tl.arange(0, OUT), tl.arange(0, IN)
    dec = tl.zeros((OUT,), tl.float32)
    enc = tl.zeros((IN,), tl.float32)
    bias = tl.full((), 0.0, tl.float32)
    live = tl.full((), 0, tl.int32)
    for start in tl.range(first, last, PAIRS):
        pair = start + tl.arange(0, PAIRS)
        here = pair < last
        place = tl.load(places + pair, mask=here, other=0)
        row = tl.load(rows + pair, mask=here, other=0).to(tl.int64)
        e = tl.load(
            error + row[:, None] * d_out + out[None, :],
            mask=here[:, None] & (out < d_out)[None, :],
            other=0.0,
        )  # [PAIRS, OUT]
        x = tl.load(
            centred + row[:, None] * d_in + column[None, :],
            mask=here[:, None] & (column < d_in)[None, :],
            other=0.0,
        )  # [PAIRS, IN]
        value = tl.load(values + place, mask=here, other=0.0)
        slope = tl.sum(e * w[None, :], 1)  # [PAIRS]
        if SLOPES:
            tl.store(slopes + place, slope, mask=here)
        alive = here
        if GAIN:
            rise = tl.load(gain + place, mask=here, other=0.0)
            slope *= rise
            alive = here & ((value != 0) | (rise != 0))
        if EXTRA:
            slope += tl.load(extra + place, mask=here, other=0.0)
        if DECODER:
            dec += tl.sum(value[:, None] * e, 0)
        enc += tl.sum(slope[:, None] * x, 0)
        bias += tl.sum(slope, 0)
        live += tl.sum(alive.to(tl.int32), 0)
    return dec, enc, bias, live


@triton.jit
def _write(
    latent: tl.tensor,
    dec: tl.tensor,
    enc: tl.tensor,
    bias: tl.tensor,
    w: tl.tensor,
    grad_enc: tl.tensor,
    grad_dec: tl.tensor,
    grad_bias: tl.tensor,
    squares: tl.tensor,
    d_out: tl.tensor,
    d_in: tl.tensor,
    ADD: tl.constexpr,
    DECODER: tl.constexpr,
    OUT: tl.constexpr,
    IN: tl.constexpr,
) -> None:
    """Remove dec's part along the unit row w, then set or add a latent's gradients."""
    out, column = tl.arange(0, OUT), tl.arange(0, IN)
    to_dec, to_enc = grad_dec + latent * d_out + out, grad_enc + latent * d_in + column
    if DECODER:
        dec -= tl.sum(dec * w, 0) * w
    if ADD:
        dec += tl.load(to_dec, mask=out < d_out, other=0.0)
        enc += tl.load(to_enc, mask=column < d_in, other=0.0)
        bias += tl.load(grad_bias + latent)
    tl.store(to_dec, dec, mask=out < d_out)
    tl.store(to_enc, enc, mask=column < d_in)
    tl.store(grad_bias + latent, bias)
    tl.store(squares + latent, tl.sum(dec * dec, 0) + tl.sum(enc * enc, 0))


@triton.jit
def _short_kernel(
    starts: tl.tensor,
    places: tl.tensor,
    rows: tl.tensor,
    values: tl.tensor,
    gain: tl.tensor,
    extra: tl.tensor,
    slopes: tl.tensor,
    error: tl.tensor,
    centred: tl.tensor,
    weight_dec: tl.tensor,
    grad_enc: tl.tensor,
    grad_dec: tl.tensor,
    grad_bias: tl.tensor,
    squares: tl.tensor,
    counts: tl.tensor,
    d_out: tl.tensor,
    d_in: tl.tensor,
    ADD: tl.constexpr,
    GAIN: tl.constexpr,
    EXTRA: tl.constexpr,
    SLOPES: tl.constexpr,
    DECODER: tl.constexpr,
    LONG: tl.constexpr,
    PAIRS: tl.constexpr,
    OUT: tl.constexpr,
    IN: tl.constexpr,
) -> None:
    """Compute the gradients of one latent with at most LONG pairs."""
    latent = tl.program_id(0).to(tl.int64)
    first, last = tl.load(starts + latent), tl.load(starts + latent + 1)
    short = last - first <= LONG
    if ADD:
        short = short & (last > first)
    if short:
        out = tl.arange(0, OUT)
        w = tl.load(weight_dec + latent * d_out + out, mask=out < d_out, other=0.0)
        dec, enc, bias, live = _add_pairs(
            first, last, places, rows, values, gain, extra, slopes, error, centred, w, d_out, d_in,
            GAIN, EXTRA, SLOPES, DECODER, PAIRS, OUT, IN,
        )  # fmt: skip
        _write(
            latent, dec, enc, bias, w, grad_enc, grad_dec, grad_bias, squares, d_out, d_in,
            ADD, DECODER, OUT, IN,
        )  # fmt: skip
        tl.store(counts + latent, live.to(tl.int64))


@triton.jit
def _pieces_kernel(
    starts: tl.tensor,
    places: tl.tensor,
    rows: tl.tensor,
    values: tl.tensor,
    gain: tl.tensor,
    extra: tl.tensor,
    slopes: tl.tensor,
    error: tl.tensor,
    centred: tl.tensor,
    weight_dec: tl.tensor,
    ends: tl.tensor,
    parts_dec: tl.tensor,
    parts_enc: tl.tensor,
    parts_bias: tl.tensor,
    parts_live: tl.tensor,
    n_latents: tl.tensor,
    d_out: tl.tensor,
    d_in: tl.tensor,
    GAIN: tl.constexpr,
    EXTRA: tl.constexpr,
    SLOPES: tl.constexpr,
    DECODER: tl.constexpr,
    LONG: tl.constexpr,
    PAIRS: tl.constexpr,
    OUT: tl.constexpr,
    IN: tl.constexpr,
) -> None:
    """Sum over one piece of the pairs of a long latent."""
    piece = tl.program_id(0).to(tl.int64)
    if piece < tl.load(ends + n_latents - 1):
        latent, number = _owner(piece, ends, n_latents)
        out, column = tl.arange(0, OUT), tl.arange(0, IN)
        w = tl.load(weight_dec + latent * d_out + out, mask=out < d_out, other=0.0)
        first = tl.load(starts + latent) + number * LONG
        last = tl.minimum(first + LONG, tl.load(starts + latent + 1))
        dec, enc, bias, live = _add_pairs(
            first, last, places, rows, values, gain, extra, slopes, error, centred, w, d_out, d_in,
            GAIN, EXTRA, SLOPES, DECODER, PAIRS, OUT, IN,
        )  # fmt: skip
        tl.store(parts_dec + piece * d_out + out, dec, mask=out < d_out)
        tl.store(parts_enc + piece * d_in + column, enc, mask=column < d_in)
        tl.store(parts_bias + piece, bias)
        tl.store(parts_live + piece, live)


@triton.jit
def _owner(piece: tl.tensor, ends: tl.tensor, n_latents: tl.tensor) -> Any:
    """Find the latent of a piece, and the number of the piece in it; `ends` int64 [n]."""
    low, high = tl.full((), 0, tl.int64), n_latents - 1 + tl.full((), 0, tl.int64)
    for _ in tl.range(0, 32):  # bisection for the first latent that ends after the piece
        middle = (low + high) // 2
        after = tl.load(ends + middle) > piece
        high = tl.where(after, middle, high)
        low = tl.where(after, low, tl.minimum(middle + 1, high))
    before = tl.load(ends + high - 1, mask=high > 0, other=0)
    return high, piece - before


@triton.jit
def _long_kernel(
    ends: tl.tensor,
    parts_dec: tl.tensor,
    parts_enc: tl.tensor,
    parts_bias: tl.tensor,
    parts_live: tl.tensor,
    weight_dec: tl.tensor,
    grad_enc: tl.tensor,
    grad_dec: tl.tensor,
    grad_bias: tl.tensor,
    squares: tl.tensor,
    counts: tl.tensor,
    n_latents: tl.tensor,
    d_out: tl.tensor,
    d_in: tl.tensor,
    ADD: tl.constexpr,
    DECODER: tl.constexpr,
    OUT: tl.constexpr,
    IN: tl.constexpr,
) -> None:
    """Add the pieces of a long latent, in the program of its first piece."""
    piece = tl.program_id(0).to(tl.int64)
    if piece < tl.load(ends + n_latents - 1):
        latent, number = _owner(piece, ends, n_latents)
        if number == 0:
            out, column = tl.arange(0, OUT), tl.arange(0, IN)
            dec = tl.zeros((OUT,), tl.float32)
            enc = tl.zeros((IN,), tl.float32)
            bias = tl.full((), 0.0, tl.float32)
            live = tl.full((), 0, tl.int64)
            for part in tl.range(piece, tl.load(ends + latent)):
                dec += tl.load(parts_dec + part * d_out + out, mask=out < d_out, other=0.0)
                enc += tl.load(parts_enc + part * d_in + column, mask=column < d_in, other=0.0)
                bias += tl.load(parts_bias + part)
                live += tl.load(parts_live + part)
            w = tl.load(weight_dec + latent * d_out + out, mask=out < d_out, other=0.0)
            _write(
                latent, dec, enc, bias, w, grad_enc, grad_dec, grad_bias, squares, d_out, d_in,
                ADD, DECODER, OUT, IN,
            )  # fmt: skip
            tl.store(counts + latent, live)


def gradients_by_latent(
    pairs: Pairs,
    error: Tensor,
    centred: Tensor,
    weight_dec: Tensor,
    into: Gradients,
    add: bool,
    decoder: bool,
    slopes: Tensor | None,
) -> Tensor:
    """`Kernels.gradients`."""
    n_latents, d_out = weight_dec.shape
    d_in = centred.shape[1]
    by_latent = Sorted.of(pairs.indices, n_latents)
    counts = torch.zeros(n_latents, dtype=torch.int64, device=error.device)
    if slopes is not None:
        slopes.zero_()
    pieces = torch.diff(by_latent.starts)  # [n_latents], number of pairs, then number of pieces
    pieces = torch.where(pieces > LONG, (pieces + LONG - 1) // LONG, 0)
    ends = pieces.cumsum(0)
    most = 2 * pairs.indices.numel() // LONG  # a long latent has fewer than 2 * pairs / LONG
    out_size, in_size = (max(16, triton.next_power_of_2(width)) for width in (d_out, d_in))
    largest = max(out_size, in_size)
    shape = {
        "PAIRS": max(1, min(8, TILE_ELEMENTS // largest)),
        "OUT": out_size,
        "IN": in_size,
        "num_warps": max(1, min(16, largest // 256)),
    }
    values = pairs.values.contiguous()
    source = (
        by_latent.starts,
        by_latent.places,
        by_latent.rows,
        values,
        # kernels don't read the stand-ins for None
        values if pairs.gain is None else pairs.gain.contiguous(),
        values if pairs.extra is None else pairs.extra.contiguous(),
        values if slopes is None else slopes,
        error.contiguous(),
        centred.contiguous(),
        weight_dec.contiguous(),
    )
    target = (into.enc, into.dec, into.bias, into.squares, counts)
    flags = {
        "GAIN": pairs.gain is not None,
        "EXTRA": pairs.extra is not None,
        "SLOPES": slopes is not None,
        "LONG": LONG,
    }
    _short_kernel[(n_latents,)](
        *source, *target, d_out, d_in, ADD=add, DECODER=decoder, **flags, **shape
    )
    if most > 0:
        parts = (
            error.new_empty(most, d_out),
            error.new_empty(most, d_in),
            error.new_empty(most),
            counts.new_empty(most),
        )
        _pieces_kernel[(most,)](
            *source,
            ends,
            *parts,
            n_latents,
            d_out,
            d_in,
            DECODER=decoder,
            **flags,
            **shape,
        )
        _long_kernel[(most,)](
            ends, *parts, weight_dec, *target, n_latents, d_out, d_in, ADD=add, DECODER=decoder,
            **{name: shape[name] for name in ("OUT", "IN", "num_warps")},
        )  # fmt: skip
    return counts
