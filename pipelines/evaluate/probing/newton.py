"""Logistic regression on one feature, to its exact optimum, for all latents and tasks at once.

For each task and latent, with z the latent's value and y the label, the kernel minimises

    E[-y log s(w z + b) - (1 - y) log(1 - s(w z + b))],    s(t) = 1 / (1 + exp(-t)),

over w and b: the probe loss of Gao et al. (2024), section 4.2, before its minimum over latents.
Most values are 0, so the zeros of a class are one weighted example.

If a threshold separates the classes, the loss has no minimum but an infimum, which is approached
as w grows: 0, or, if values of both classes lie at the threshold, the entropy of the labels there.
This is common: a rare latent that fires on one class only has the infimum of a 2x2 table. The
kernel then returns an infinite weight, the threshold, and the log-odds at the threshold as bias.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from sae_harvest.common.cache import use_numba_cache

use_numba_cache()

from numba import njit, prange  # noqa: E402

NEGATIVE, POSITIVE, ABSENT = 0, 1, 2  # codes of an example in a task
LOSS, WEIGHT, BIAS, THRESHOLD, STEPS = range(5)  # columns of a fit
MAX_STEPS = 200
PRECISION = 1e-13  # of the loss, per example
PRODUCT = 256  # factors between 1 and 2 that are multiplied before their logarithm is taken

Codes = npt.NDArray[np.uint8]  # [examples, tasks]


@njit(parallel=True, nogil=True, cache=True)
def fit_all(
    starts: npt.NDArray[np.int64],
    example: npt.NDArray[np.int32],
    value: npt.NDArray[np.float32],
    codes: Codes,
    counts: npt.NDArray[np.int64],
    class_weights: npt.NDArray[np.float64],
    limits: npt.NDArray[np.float64],
) -> npt.NDArray[np.float64]:
    """Fit every latent to every task.

    The examples on which a latent is 0 have one probability in common, so the loss is at least the
    entropy of their labels. A latent with which this alone exceeds the task's limit is not fitted.

    Args:
        starts: int64 [latents + 1], where each latent's pairs begin.
        example: int32 [pairs], examples on which the latent is not 0.
        value: float32 [pairs], its values there.
        codes: uint8 [examples, tasks], the class of each example; 2: not in the task.
        counts: int64 [tasks, 2], negative and positive examples of each task; both above 0.
        class_weights: float64 [tasks, 2], weight of an example of each class.
        limits: float64 [tasks], largest losses that are of interest; infinite for all.

    Returns:
        float64 [latents, tasks, 5]: loss in nats per example (infinite if it exceeds the limit and
        was not fitted), weight, bias, threshold (0 for a finite weight), steps. The probability of
        the positive class is s(w (z - threshold) + b).
    """
    n_latents, n_tasks = len(starts) - 1, codes.shape[1]
    fits = np.empty((n_latents, n_tasks, 5))
    for i in prange(n_latents):
        first, last = starts[i], starts[i + 1]
        z, y = np.empty(last - first), np.empty(last - first)
        for t in range(n_tasks):
            m = 0
            fired = np.zeros(2, np.int64)
            for p in range(first, last):
                code = codes[example[p], t]
                if code != ABSENT and value[p] != 0:
                    z[m], y[m] = value[p], code
                    fired[code] += 1
                    m += 1
            zeros = (counts[t] - fired) * class_weights[t]
            if _entropy(zeros) > limits[t] * (counts[t] * class_weights[t]).sum():
                fits[i, t] = 0.0
                fits[i, t, LOSS] = np.inf
                continue
            fits[i, t] = fit_one(z[:m], y[:m], counts[t] - fired, class_weights[t])
    return fits


@njit(nogil=True, cache=True)
def fit_one(z: Any, y: Any, zeros: Any, class_weights: Any) -> Any:
    """Fit one feature.

    Args:
        z: float64 [m], values that are not 0.
        y: float64 [m], labels 0 or 1.
        zeros: int64 [2], examples of each class whose value is 0.
        class_weights: float64 [2], weight of an example of each class.

    Returns:
        float64 [5], as in `fit_all`.
    """
    lowest, highest = np.full(2, np.inf), np.full(2, -np.inf)
    total = np.zeros(2)
    for c in range(2):
        total[c] = zeros[c] * class_weights[c]
        if zeros[c] > 0:
            lowest[c], highest[c] = 0.0, 0.0
    scale = 0.0
    for j in range(len(z)):
        c = int(y[j])
        total[c] += class_weights[c]
        lowest[c], highest[c] = min(lowest[c], z[j]), max(highest[c], z[j])
        scale = max(scale, abs(z[j]))
    if lowest[1] >= highest[0]:
        return _separated(z, y, zeros, class_weights, total, highest[0], lowest[1], 1.0)
    if lowest[0] >= highest[1]:
        return _separated(z, y, zeros, class_weights, total, highest[1], lowest[0], -1.0)
    return _newton(z, y, zeros, class_weights, total, scale)


@njit(nogil=True, cache=True)
def _separated(
    z: Any, y: Any, zeros: Any, class_weights: Any, total: Any, below: Any, above: Any, sign: Any
) -> Any:
    """Return the infimum if one class lies at or below `below`, the other at or above `above`."""
    fit = np.zeros(5)
    if above > below:
        fit[WEIGHT], fit[THRESHOLD] = sign * np.inf, (above + below) / 2
        return fit
    at = np.zeros(2)  # weight of each class at the threshold
    if above == 0:
        at[:] = zeros * class_weights
    else:
        for j in range(len(z)):
            if z[j] == above:
                at[int(y[j])] += class_weights[int(y[j])]
    fit[LOSS] = _entropy(at) / (total[0] + total[1])
    fit[BIAS] = math.log(at[1]) - math.log(at[0])
    if at[0] < total[0] or at[1] < total[1]:
        fit[WEIGHT], fit[THRESHOLD] = sign * np.inf, above
    return fit


@njit(nogil=True, cache=True)
def _entropy(weights: Any) -> Any:
    """Return the entropy of labels in nats, times their weight; weights: float64 [2]."""
    total = weights[0] + weights[1]
    entropy = 0.0
    for c in range(2):
        if weights[c] > 0:
            entropy -= weights[c] * math.log(weights[c] / total)
    return entropy


@njit(nogil=True, cache=True)
def _newton(z: Any, y: Any, zeros: Any, class_weights: Any, total: Any, scale: Any) -> Any:
    """Minimise by Newton's method with halved steps; classes overlap, so there is a minimum."""
    n = total[0] + total[1]
    constant = math.log(total[1]) - math.log(total[0])
    w, b = _start(z, y, zeros, class_weights, scale, constant)
    here, trial = np.empty(6), np.empty(6)
    _evaluate(z, y, zeros, class_weights, scale, w, b, here)
    if w != 0:
        _evaluate(z, y, zeros, class_weights, scale, 0.0, constant, trial)
        if trial[0] < here[0]:
            w, b = 0.0, constant
            here[:] = trial
    steps = 0
    while steps < MAX_STEPS:
        steps += 1
        loss, g_w, g_b, h_ww, h_wb, h_bb = here
        determinant = h_ww * h_bb - h_wb * h_wb
        if determinant <= 1e-14 * h_ww * h_bb:  # flat in one direction, by rounding
            determinant = h_ww * h_bb * (1 + 1e-9) - h_wb * h_wb
        step_w = (h_wb * g_b - h_bb * g_w) / determinant
        step_b = (h_wb * g_w - h_ww * g_b) / determinant
        decrease = -(g_w * step_w + g_b * step_b)
        if not decrease > 2 * PRECISION * n:
            if decrease > 0:
                w, b = w + step_w, b + step_b
            break
        share, better = 1.0, False
        while share > 1e-9:
            _evaluate(
                z, y, zeros, class_weights, scale, w + share * step_w, b + share * step_b, trial
            )
            if trial[0] <= loss - 1e-4 * share * decrease:
                better = True
                break
            share /= 2
        if not better:  # no smaller loss in this precision
            break
        w, b = w + share * step_w, b + share * step_b
        here[:] = trial
    fit = np.zeros(5)
    fit[LOSS], fit[WEIGHT], fit[BIAS], fit[STEPS] = here[0] / n, w / scale, b, steps
    return fit


@njit(nogil=True, cache=True)
def _start(z: Any, y: Any, zeros: Any, class_weights: Any, scale: Any, constant: Any) -> Any:
    """Return the weight and bias that fit the 2x2 table of labels and zeros, about."""
    mean, fired = 0.0, np.zeros(2)
    for j in range(len(z)):
        mean += z[j] / scale
        fired[int(y[j])] += class_weights[int(y[j])]
    if zeros[0] == 0 or zeros[1] == 0 or mean == 0:
        return 0.0, constant
    mean /= len(z)
    bias = math.log(zeros[1] * class_weights[1]) - math.log(zeros[0] * class_weights[0])
    half_0, half_1 = class_weights[0] / 2, class_weights[1] / 2
    odds = math.log(fired[1] + half_1) - math.log(fired[0] + half_0)
    return (odds - bias) / mean, bias


@njit(nogil=True, cache=True)
def _evaluate(
    z: Any, y: Any, zeros: Any, class_weights: Any, scale: Any, w: Any, b: Any, out: Any
) -> None:
    """Write the loss, its two derivatives and its three second derivatives, summed over examples.

    The derivatives are by w for values divided by `scale`, and by b.
    """
    loss, g_w, g_b, h_ww, h_wb, h_bb = 0.0, 0.0, 0.0, 0.0, 0.0, 0.0
    sums = np.zeros(2)  # of softplus(-|t|), for each class
    products, factors = np.ones(2), 0
    w_0, w_1 = class_weights[0], class_weights[1]
    for j in range(len(z)):
        u = z[j] / scale
        t = w * u + b
        e = math.exp(-abs(t))
        inverse = 1 / (1 + e)
        share = inverse if t > 0 else e * inverse
        c = int(y[j])
        weight = w_1 if c == 1 else w_0
        products[c] *= 1 + e
        factors += 1
        if factors == PRODUCT:
            sums[0] += math.log(products[0])
            sums[1] += math.log(products[1])
            products[0], products[1], factors = 1.0, 1.0, 0
        loss += weight * (max(t, 0.0) - y[j] * t)
        slope, curve = weight * (share - y[j]), weight * e * inverse * inverse
        g_w += slope * u
        g_b += slope
        h_ww += curve * u * u
        h_wb += curve * u
        h_bb += curve
    for c in range(2):
        loss += class_weights[c] * (sums[c] + math.log(products[c]))
    e = math.exp(-abs(b))
    share = 1 / (1 + e) if b > 0 else e / (1 + e)
    n_0, n_1 = zeros[0] * w_0, zeros[1] * w_1
    loss += (n_0 + n_1) * (max(b, 0.0) + math.log1p(e)) - n_1 * b
    g_b += n_0 * share - n_1 * (1 - share)
    h_bb += (n_0 + n_1) * e / (1 + e) ** 2
    out[0], out[1], out[2] = loss, g_w, g_b
    out[3], out[4], out[5] = h_ww, h_wb, h_bb
