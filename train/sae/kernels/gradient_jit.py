"""Compiled loops of the training step: gradients by latent, the Adam step.

The loops take numpy arrays; `train.sae.kernels.cpu` calls them with tensors. One thread writes each
output row, and each sum has a fixed order, so that results are the same to the bit each time.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from sae_harvest.train.sae.kernels.jit import FAST, njit, prange


@njit(**FAST)
def pairs_by_latent(indices: Any, n_latents: int) -> Any:
    """Sort the pairs (row, slot) by latent, by counting; within a latent, by row.

    Args:
        indices: int32 [rows, w]; -1 is no pair.

    Returns:
        starts: int64 [n_latents + 1]; places: int64 [pairs], row * w + slot of each pair.
    """
    n_rows, width = indices.shape
    starts = np.zeros(n_latents + 1, np.int64)
    for row in range(n_rows):
        for j in range(width):
            if indices[row, j] >= 0:
                starts[indices[row, j] + 1] += 1
    for latent in range(n_latents):
        starts[latent + 1] += starts[latent]
    cursor = starts[:-1].copy()
    places = np.empty(starts[-1], np.int64)
    for row in range(n_rows):
        for j in range(width):
            latent = indices[row, j]
            if latent >= 0:
                places[cursor[latent]] = row * width + j
                cursor[latent] += 1
    return starts, places


@njit(**FAST)
def _four_slopes(error: Any, rows: Any, w: Any, slopes: Any) -> None:
    """Set slopes[j] = error[rows[j]] . w, for four rows."""
    a, b, c, d = error[rows[0]], error[rows[1]], error[rows[2]], error[rows[3]]
    sums = (np.float32(0), np.float32(0), np.float32(0), np.float32(0))
    total_a, total_b, total_c, total_d = sums
    for i in range(w.shape[0]):
        total_a += a[i] * w[i]
        total_b += b[i] * w[i]
        total_c += c[i] * w[i]
        total_d += d[i] * w[i]
    slopes[0], slopes[1], slopes[2], slopes[3] = total_a, total_b, total_c, total_d


@njit(**FAST)
def _add_four(factors: Any, source: Any, rows: Any, out: Any) -> None:
    """Add sum_j factors[j] source[rows[j]] to out, for four rows."""
    a, b, c, d = source[rows[0]], source[rows[1]], source[rows[2]], source[rows[3]]
    p, q, r, s = factors[0], factors[1], factors[2], factors[3]
    for i in range(out.shape[0]):
        out[i] += (p * a[i] + q * b[i]) + (r * c[i] + s * d[i])


@njit(parallel=True, **FAST)
def latent_gradients(
    starts: Any,
    places: Any,
    bounds: Any,
    values: Any,
    gain: Any,
    extra: Any,
    error: Any,
    centred: Any,
    weight_dec: Any,
    add: bool,
    decoder: bool,
    grad_enc: Any,
    grad_dec: Any,
    grad_bias: Any,
    squares: Any,
    slopes: Any,
) -> None:
    """Compute the gradients of each latent's encoder row, decoder row and bias.

    For each pair of latent l: s = error[row] . W_dec[l], t = s gain + extra; then
    dW_dec[l] += v error[row], dW_enc[l] += t centred[row], db[l] += t. The part of the decoder
    gradient along W_dec[l] (rows have unit norm) is removed. This is linear, so that the
    gradients of several parts of a batch may be added.

    Args:
        starts, places: from `pairs_by_latent`.
        bounds: int64 [parts + 1], part p has the latents [bounds[p], bounds[p + 1]).
        values: float32 [batch, w].
        gain, extra: float32 [batch, w]; an empty array [0, 0] stands for 1 and 0.
        error: float32 [batch, d_out], gradient of the loss with respect to the reconstruction.
        centred: float32 [batch, d_in], the encoder's input.
        weight_dec: float32 [n_latents, d_out], unit rows.
        add: add to the gradients, and do not change latents without pairs; otherwise set all.
        decoder: whether pairs give the decoder a gradient.
        grad_enc: float32 [n_latents, d_in]; grad_dec: float32 [n_latents, d_out].
        grad_bias: float32 [n_latents].
        squares: float32 [n_latents], squared norm of the latent's enc and dec together.
        slopes: float32 [batch, w], receives s of each pair; or an empty array [0, 0].
    """
    width, d_in, d_out = values.shape[1], centred.shape[1], weight_dec.shape[1]
    # empty arrays, not None: each combination with None would be compiled separately
    scaled, shifted, told = gain.size > 0, extra.size > 0, slopes.size > 0
    for part in prange(bounds.shape[0] - 1):
        new_dec = np.empty(d_out, np.float32)
        new_enc = np.empty(d_in, np.float32)
        rows, slots = np.empty(4, np.int64), np.empty(4, np.int64)
        terms, factors = np.empty(4, np.float32), np.empty(4, np.float32)
        for latent in range(bounds[part], bounds[part + 1]):
            first, last = starts[latent], starts[latent + 1]
            if first == last:
                if not add:
                    grad_enc[latent, :] = 0
                    grad_dec[latent, :] = 0
                    grad_bias[latent] = 0
                    squares[latent] = 0
                continue
            w = weight_dec[latent]
            new_dec[:] = 0
            new_enc[:] = 0
            bias = np.float32(0)
            for pair in range(first, last, 4):
                for j in range(4):  # past the last pair: its row again, times zero
                    at = places[min(pair + j, last - 1)]
                    rows[j] = at // width
                    slots[j] = at - rows[j] * width
                _four_slopes(error, rows, w, terms)
                for j in range(4):
                    there = pair + j < last
                    row, slot = rows[j], slots[j]
                    if told and there:
                        slopes[row, slot] = terms[j]
                    if scaled:
                        terms[j] *= gain[row, slot]
                    if shifted:
                        terms[j] += extra[row, slot]
                    if not there:
                        terms[j] = 0
                    factors[j] = values[row, slot] if there else np.float32(0)
                    bias += terms[j]
                _add_four(terms, centred, rows, new_enc)
                if decoder:
                    _add_four(factors, error, rows, new_dec)
            along = np.float32(0)
            for i in range(d_out):
                along += new_dec[i] * w[i]
            for i in range(d_out):
                new_dec[i] -= along * w[i]
            if add:
                for i in range(d_out):
                    new_dec[i] += grad_dec[latent, i]
                for i in range(d_in):
                    new_enc[i] += grad_enc[latent, i]
                bias += grad_bias[latent]
            square = np.float32(0)
            for i in range(d_out):
                square += new_dec[i] * new_dec[i]
            for i in range(d_in):
                square += new_enc[i] * new_enc[i]
            grad_dec[latent, :] = new_dec
            grad_enc[latent, :] = new_enc
            grad_bias[latent] = bias
            squares[latent] = square


@njit(**FAST)
def count_live(indices: Any, values: Any, gain: Any, counts: Any) -> None:
    """Count the pairs with a value or a gain, by latent, into counts, int64 [n_latents]."""
    for row in range(indices.shape[0]):
        for j in range(indices.shape[1]):
            if indices[row, j] >= 0 and (values[row, j] != 0 or gain[row, j] != 0):
                counts[indices[row, j]] += 1


@njit(**FAST)
def add_by_latent(indices: Any, terms: Any, sums: Any) -> None:
    """Add the terms of each latent's pairs, row by row, to sums, float64 [n_latents]."""
    for row in range(indices.shape[0]):
        for j in range(indices.shape[1]):
            if indices[row, j] >= 0:
                sums[indices[row, j]] += terms[row, j]


@njit(**FAST)
def _adam(p: Any, g: Any, m: Any, v: Any, numbers: Any) -> None:
    """Do one Adam step on one row, in place."""
    scale, rate, beta1, beta2, root, eps = (
        numbers[0], numbers[1], numbers[2], numbers[3], numbers[4], numbers[5],
    )  # fmt: skip
    one = np.float32(1)
    for i in range(p.shape[0]):
        gradient = g[i] * scale
        first = beta1 * m[i] + (one - beta1) * gradient
        second = beta2 * v[i] + (one - beta2) * gradient * gradient
        m[i] = first
        v[i] = second
        p[i] -= rate * first / (np.sqrt(second) * root + eps)


@njit(parallel=True, **FAST)
def adam_rows(
    weight: Any, gradient: Any, first: Any, second: Any, average: Any, numbers: Any, unit: bool
) -> None:
    """Do an Adam step on each row, rescale it to unit norm if `unit`, and update the average.

    Args:
        weight, gradient, first, second: float32 [rows, d], weight and both moments in place.
        average: float32 [rows, d], exponential average of the weights, in place.
        numbers: float32 [7]: factor on the gradient (clipping), step size over 1 - beta1^t,
            beta1, beta2, 1 / sqrt(1 - beta2^t), eps, share of the average that stays.
        unit: rescale rows to unit norm after the step (decoder).
    """
    keep = numbers[6]
    for row in prange(weight.shape[0]):
        p, a = weight[row], average[row]
        _adam(p, gradient[row], first[row], second[row], numbers)
        if unit:
            square = np.float32(0)
            for i in range(p.shape[0]):
                square += p[i] * p[i]
            inverse = np.float32(1) / np.sqrt(square)
            for i in range(p.shape[0]):
                p[i] *= inverse
        for i in range(p.shape[0]):
            a[i] = keep * a[i] + (np.float32(1) - keep) * p[i]
