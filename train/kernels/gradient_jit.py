"""Compiled loops of the training step: sparse decode, gradients by latent, the Adam step.

Only loops over numpy arrays live here; `train.kernels.cpu` gives them tensors. Every output row
is written by one thread and every sum runs in one order, so results are the same bits each time.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from train.kernels.selection_jit import FAST, njit, prange


@njit(parallel=True, **FAST)
def decode_rows(indices: Any, values: Any, weight: Any, out: Any) -> None:
    """out[row] += sum_j values[row, j] weight[indices[row, j]].

    Args:
        indices: int32 [rows, k]. values: float32 [rows, k]. weight: float32 [n_latents, d_in].
        out: float32 [rows, d_in], added to.
    """
    rows, k = indices.shape
    d_in = weight.shape[1]
    for row in prange(rows):
        target = out[row]
        for j in range(k):
            value = values[row, j]
            if value != 0:
                w = weight[indices[row, j]]
                for i in range(d_in):
                    target[i] += value * w[i]


@njit(**FAST)
def sort_by_latent(indices: Any, values: Any, skip_zero: bool, n_latents: int) -> Any:
    """Counting sort of the pairs (row, slot) by latent, rows in order within a latent.

    Returns:
        starts: int64 [n_latents + 1]; rows: int32 [pairs]; sorted values: float32 [pairs].
        With `skip_zero`, pairs of value zero (cut by ReLU: no gradient) are left out.
    """
    n_rows, k = indices.shape
    starts = np.zeros(n_latents + 1, np.int64)
    for row in range(n_rows):
        for j in range(k):
            if not skip_zero or values[row, j] != 0:
                starts[indices[row, j] + 1] += 1
    for latent in range(n_latents):
        starts[latent + 1] += starts[latent]
    cursor = starts[:-1].copy()
    rows = np.empty(starts[-1], np.int32)
    kept = np.empty(starts[-1], np.float32)
    for row in range(n_rows):
        for j in range(k):
            if not skip_zero or values[row, j] != 0:
                place = cursor[indices[row, j]]
                rows[place] = row
                kept[place] = values[row, j]
                cursor[indices[row, j]] = place + 1
    return starts, rows, kept


@njit(parallel=True, **FAST)
def latent_gradients(
    starts: Any,
    rows: Any,
    values: Any,
    bounds: Any,
    error: Any,
    centred: Any,
    weight_dec: Any,
    add: bool,
    grad_enc: Any,
    grad_dec: Any,
    grad_bias: Any,
    squares: Any,
) -> None:
    """Gradients of one latent's encoder row, decoder row and bias, latent by latent.

    For each pair of latent l: dv = error[row] . W_dec[l]; then dW_dec[l] += v error[row],
    dW_enc[l] += dv centred[row], db[l] += dv. The decoder gradient loses its part along
    W_dec[l] (rows have unit norm), which is linear, so parts may be added one after another.

    Args:
        starts, rows, values: from `sort_by_latent`.
        bounds: int64 [parts + 1], latents [bounds[p], bounds[p + 1]) go to part p.
        error: float32 [batch, d_in], gradient of the loss by the reconstruction.
        centred: float32 [batch, d_in], the encoder's input.
        weight_dec: float32 [n_latents, d_in], unit rows.
        add: add to the gradients and leave other latents alone, or set them all.
        grad_enc, grad_dec: float32 [n_latents, d_in]; grad_bias: float32 [n_latents].
        squares: float32 [n_latents], squared norm of the latent's gradients together.
    """
    d_in = weight_dec.shape[1]
    for part in prange(bounds.shape[0] - 1):
        new_dec = np.empty(d_in, np.float32)
        new_enc = np.empty(d_in, np.float32)
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
            for i in range(d_in):
                new_dec[i] = 0
                new_enc[i] = 0
            bias = np.float32(0)
            for pair in range(first, last):
                e, x, value = error[rows[pair]], centred[rows[pair]], values[pair]
                slope = np.float32(0)
                for i in range(d_in):
                    slope += e[i] * w[i]
                for i in range(d_in):
                    new_dec[i] += value * e[i]
                    new_enc[i] += slope * x[i]
                bias += slope
            along = np.float32(0)
            for i in range(d_in):
                along += new_dec[i] * w[i]
            for i in range(d_in):
                new_dec[i] -= along * w[i]
            if add:
                for i in range(d_in):
                    new_dec[i] += grad_dec[latent, i]
                    new_enc[i] += grad_enc[latent, i]
                bias += grad_bias[latent]
            square = bias * bias
            for i in range(d_in):
                square += new_dec[i] * new_dec[i] + new_enc[i] * new_enc[i]
            grad_dec[latent, :] = new_dec
            grad_enc[latent, :] = new_enc
            grad_bias[latent] = bias
            squares[latent] = square


@njit(**FAST)
def _adam(p: Any, g: Any, m: Any, v: Any, numbers: Any) -> None:
    """One Adam step on one row, in place."""
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
    """Adam step on each row, renormalised to length one if `unit`, then the average of weights.

    Args:
        weight, gradient, first, second: float32 [rows, d], weight and both moments in place.
        average: float32 [rows, d], exponential average of the weights, in place.
        numbers: float32 [7]: factor on the gradient (clipping), step size over 1 - beta1^t,
            beta1, beta2, 1 / sqrt(1 - beta2^t), eps, share of the average that is kept.
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
