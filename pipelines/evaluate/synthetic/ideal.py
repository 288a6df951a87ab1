"""The SAE that one would build knowing the truth of a synthetic store: the mark to reach.

    decoder      the true directions
    encoder      least squares of the true magnitudes on training rows
    threshold    of each latent, the one with the largest F1 of its firings on the same rows
    scale        of each encoder row, least squares of the true magnitudes where the latent fires

It knows the directions, so no SAE has a higher cosine. Its firings are those of the best threshold
on this linear encoder, which takes the interference of other features into account; a better
encoder is not excluded.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from sae_harvest.common.errors import InputError
from sae_harvest.store.rules import RowRule
from sae_harvest.train.config import SAEConfig
from sae_harvest.train.evaluate import batches
from sae_harvest.train.sae.sae import SAE
from sae_harvest.train.synthetic.store import Synthetic

ROWS = 32_768
BLOCK = 256  # features whose thresholds are found at a time
RANK = 1e-9  # variance, relative to the largest, below which a direction of the rows is noise

Floats = npt.NDArray[np.float64]
# index of the row among those asked for, feature, magnitude: [firings] each
RowFirings = tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.float32]]


def ideal_sae(synthetic: Synthetic, rule: RowRule, most: int = ROWS) -> SAE:
    """Return the ideal SAE of a synthetic store.

    Args:
        synthetic: the store and what is true of it.
        rule: the rule of training; only its training rows are read.
        most: largest number of rows to read.

    Raises:
        InputError: the store holds no row of a training document.
    """
    store, features = synthetic.store, synthetic.features
    (site,) = store.sites
    config = SAEConfig(
        d_in=store.width(site),
        n_latents=len(features),
        activation="jumprelu",
        site=site,
        rule=rule,
        model=store.plan["model"]["name"],
    )
    rows = np.flatnonzero(store.selected(site, rule.model_copy(update={"split": "train"})))[:most]
    if not len(rows):
        raise InputError(
            f"{store.place} holds no row of a training document; make one with more --rows."
        )
    x = np.concatenate([wanted.double().numpy() for _, _, wanted in batches(store, config, rows)])
    firings = firings_of(synthetic, rows)
    W_enc, b_enc = _least_squares(x, firings, len(features))
    threshold = np.empty(len(features))
    for first in range(0, len(features), BLOCK):
        block = slice(first, min(first + BLOCK, len(features)))
        pi = x @ W_enc[block].T + b_enc[block]  # [rows, features of the block]
        true = _dense(firings, pi.shape, first)
        threshold[block] = best_thresholds(pi, true > 0)
        pi[pi <= threshold[block]] = 0
        squares = (pi * pi).sum(0)
        scale = np.divide((pi * true).sum(0), squares, out=np.ones_like(squares), where=squares > 0)
        W_enc[block] *= scale[:, None]
        b_enc[block] *= scale
        threshold[block] *= scale
    tensors = {"W_enc": W_enc, "b_enc": b_enc, "threshold": threshold}
    return SAE(
        config,
        W_dec=torch.from_numpy(features.directions.copy()),
        b_dec=torch.zeros(config.d_in),
        **{name: torch.from_numpy(array).float() for name, array in tensors.items()},
    )


def _least_squares(x: Floats, firings: RowFirings, n: int) -> tuple[Floats, Floats]:
    """Return encoder rows [n, d] and biases [n] that predict magnitudes from rows x [rows, d]."""
    row, feature, magnitude = firings
    order = np.argsort(feature, kind="stable")
    starts = np.searchsorted(feature[order], np.arange(n + 1))
    products = np.empty((n, x.shape[1]))  # mean of magnitude times row
    for number in range(n):
        here = order[starts[number] : starts[number + 1]]
        products[number] = magnitude[here] @ x[row[here]] / len(x)
    mean, expected = x.mean(0), np.bincount(feature, magnitude, n) / len(x)
    covariance = x.T @ x / len(x) - np.outer(mean, mean)
    joint = products - np.outer(expected, mean)
    W_enc = joint @ np.linalg.pinv(covariance, RANK, hermitian=True)
    return W_enc, expected - W_enc @ mean


def _dense(firings: RowFirings, shape: tuple[int, ...], first: int) -> Floats:
    """Return the magnitudes of some features from `first` on, float64 [rows, features]."""
    row, feature, magnitude = firings
    inside = (feature >= first) & (feature < first + shape[1])
    found = np.zeros(shape)
    found[row[inside], feature[inside] - first] = magnitude[inside]
    return found


def firings_of(synthetic: Synthetic, rows: npt.NDArray[np.int64]) -> RowFirings:
    """Return the true firings on some rows.

    Args:
        synthetic: the store and what is true of it.
        rows: numbers of rows in order, int64 [rows].

    Returns:
        Index into `rows`, feature and magnitude of each firing, [firings] each, by row.
    """
    found = []
    shards = rows // synthetic.store.shard_rows
    for shard in np.unique(shards).tolist():
        firings = synthetic.firings(shard)
        place = np.searchsorted(rows, firings.row)
        here = rows[np.minimum(place, len(rows) - 1)] == firings.row
        found.append((place[here], firings.feature[here], firings.magnitude[here]))
    row, feature, magnitude = (np.concatenate(parts) for parts in zip(*found, strict=True))
    return row, feature, magnitude


def best_thresholds(pi: Floats, fires: npt.NDArray[np.bool_]) -> Floats:
    """Return the threshold, 0 or more, with the largest F1 of `pi > threshold` for each column.

    Args:
        pi: float64 [rows, columns].
        fires: bool [rows, columns], what `pi > threshold` should be.
    """
    order = np.argsort(-pi, axis=0, kind="stable")
    pi = np.take_along_axis(pi, order, 0)
    right = np.cumsum(np.take_along_axis(fires, order, 0), axis=0)  # [rows, columns]
    chosen = np.arange(1, len(pi) + 1)[:, None]
    f1 = 2 * right / (chosen + right[-1])
    f1[:-1][pi[:-1] == pi[1:]] = -1  # no threshold lies between equal numbers
    f1[pi <= 0] = -1  # thresholds are not negative
    at = f1.argmax(0)
    columns = np.arange(pi.shape[1])
    above, below = pi[at, columns], pi[np.minimum(at + 1, len(pi) - 1), columns]
    threshold = np.where(right[-1] > 0, (above + below) / 2, pi[0])
    return np.maximum(threshold, 0.0)
