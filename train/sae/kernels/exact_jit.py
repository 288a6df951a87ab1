"""Compiled loops for exact float32 values: pre-activations of pairs, and sparse decoding.

The loops process four latents at a time, so that four rows of the weights are read from memory
together. With one latent at a time, the loops would wait for each row.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from sae_harvest.train.sae.kernels.jit import FAST, njit, prange

PARTS = 64  # pieces of a batch, which the threads take in turn; each allocates buffers once


@njit(**FAST)
def _dots(x: Any, weight: Any, bias: Any, latents: Any, out: Any) -> None:
    """Set out[j] = x . weight[latents[j]] + bias[latents[j]]; -inf where the latent is -1."""
    last = latents.shape[0] - 1
    for j in range(0, last + 1, 4):
        a = weight[max(latents[j], 0)]
        b = weight[max(latents[min(j + 1, last)], 0)]
        c = weight[max(latents[min(j + 2, last)], 0)]
        d = weight[max(latents[min(j + 3, last)], 0)]
        sums = (np.float32(0), np.float32(0), np.float32(0), np.float32(0))
        total_a, total_b, total_c, total_d = sums
        for i in range(x.shape[0]):
            total_a += x[i] * a[i]
            total_b += x[i] * b[i]
            total_c += x[i] * c[i]
            total_d += x[i] * d[i]
        out[j] = total_a
        if j + 1 <= last:
            out[j + 1] = total_b
        if j + 2 <= last:
            out[j + 2] = total_c
        if j + 3 <= last:
            out[j + 3] = total_d
    for j in range(last + 1):
        out[j] = out[j] + bias[latents[j]] if latents[j] >= 0 else -np.inf


@njit(**FAST)
def exact_pairs(centred: Any, weight: Any, bias: Any, indices: Any, values: Any) -> None:
    """Compute exact float32 pre-activations of pairs, -inf where the index is -1.

    Args:
        centred: float32 [rows, d_in]. weight: float32 [n_latents, d_in]. bias: float32 [n_latents].
        indices: int32 [rows, w]. values: float32 [rows, w], written.
    """
    for row in range(indices.shape[0]):
        _dots(centred[row], weight, bias, indices[row], values[row])


@njit(**FAST)
def exact_rows(
    centred: Any, weight: Any, bias: Any, candidates: Any, relu: bool, indices: Any, values: Any
) -> None:
    """Compute exact float32 pre-activations of candidates, and keep the k largest, decreasing.

    Args:
        centred: float32 [rows, d_in]. weight: float32 [n_latents, d_in]. bias: float32 [n_latents].
        candidates: int32 [rows, count], increasing. relu: whether negative values become zero.
        indices: int32 [rows, k], written. values: float32 [rows, k], written.
    """
    rows, count = candidates.shape
    k = indices.shape[1]
    for row in range(rows):
        exact = np.empty(count, np.float32)
        _dots(centred[row], weight, bias, candidates[row], exact)
        falling = np.empty(count, np.float32)
        for c in range(count):  # NaN comes first, so that it is seen
            falling[c] = -np.inf if np.isnan(exact[c]) else -exact[c]
        order = np.argsort(falling, kind="mergesort")  # stable: ties keep the lower index first
        for j in range(k):
            best = order[j]
            value = exact[best]
            indices[row, j] = candidates[row, best]
            values[row, j] = max(value, np.float32(0)) if relu else value


@njit(**FAST)
def _add_latents(values: Any, latents: Any, weight: Any, target: Any) -> None:
    """Add sum_j values[j] weight[latents[j]] to target, for a multiple of four latents."""
    for j in range(0, latents.shape[0], 4):
        a, b = weight[latents[j]], weight[latents[j + 1]]
        c, d = weight[latents[j + 2]], weight[latents[j + 3]]
        p, q, r, s = values[j], values[j + 1], values[j + 2], values[j + 3]
        for i in range(target.shape[0]):
            target[i] += (p * a[i] + q * b[i]) + (r * c[i] + s * d[i])


@njit(parallel=True, **FAST)
def decode_rows(indices: Any, values: Any, weight: Any, out: Any) -> None:
    """Add sum_j values[row, j] weight[indices[row, j]] to out[row].

    Args:
        indices: int32 [rows, w], -1: no pair. values: float32 [rows, w].
        weight: float32 [n_latents, d_out]. out: float32 [rows, d_out], added to.
    """
    rows, width = indices.shape
    parts = min(rows, PARTS)
    for part in prange(parts):
        latents = np.empty(width + 3, np.int32)
        live = np.empty(width + 3, np.float32)
        for row in range(part * rows // parts, (part + 1) * rows // parts):
            found = 0
            for j in range(width):
                if indices[row, j] >= 0 and values[row, j] != 0:
                    latents[found] = indices[row, j]
                    live[found] = values[row, j]
                    found += 1
            if found == 0:
                continue
            whole = (found + 3) // 4 * 4
            latents[found:whole] = latents[found - 1]
            live[found:whole] = 0
            _add_latents(live[:whole], latents[:whole], weight, out[row])
