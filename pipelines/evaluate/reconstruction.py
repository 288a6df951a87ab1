"""The reconstruction of held-out rows by a dictionary: every definition in use, from one pass.

With x a row, x_hat its reconstruction, mu the mean of the evaluated rows, sums over rows:

    fvu                  sum |x - x_hat|^2 / sum |x - mu|^2
    explained_variance_legacy   mean of 1 - |x - x_hat|^2 / |x - mu|^2       (SAELens before 6)
    row_nmse             mean of |x - x_hat|^2 / |x|^2                        (OpenAI's code)
    paper_nmse           fvu of rows that are normalised by their own mean and norm
                         (Gao et al. 2024, section 2.1; x_hat by those of x)
    cosine               mean of x . x_hat / (|x| |x_hat|)
    norm_ratio           mean of |x_hat| / |x|
    reconstruction_bias  sum |x_hat|^2 / sum x . x_hat; below 1, reconstructions are too short
                         (Rajamanoharan et al. 2024)

Sums are float64. The mean is subtracted before squares are summed, so that no digits are lost.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from sae_harvest.pipelines.evaluate.figures import Figure, figure_of_sums
from sae_harvest.pipelines.evaluate.intervals import CLUSTERS, Floats, ratio, row_clusters
from sae_harvest.store.reader import ActivationStore
from sae_harvest.store.rules import RowRule
from sae_harvest.store.statistics.stats import Moments
from sae_harvest.train.config import SAEConfig
from sae_harvest.train.evaluate import CLASSES, batches, heldout_rows
from sae_harvest.train.sae.sae import SAE

PARTS = ("without outliers", "with outliers")
TINY = 1e-30  # keeps a quotient finite if a row is 0
# sums that are kept for each cluster
SUMS = (
    "rows",
    "l0",
    "l1",
    "error",
    "deviation",
    "own_error",
    "own_deviation",
    "explained",
    "row_nmse",
    "cosine",
    "norm",
    "norm_hat",
    "norm_ratio",
    "square_hat",
    "product",
)
# metric → the two sums whose quotient it is
METRICS = {
    "fvu": ("error", "deviation"),
    "l0": ("l0", "rows"),
    "l1": ("l1", "rows"),
    "mse": ("error", "rows"),
    "paper_nmse": ("own_error", "own_deviation"),
    "explained_variance_legacy": ("explained", "rows"),
    "row_nmse": ("row_nmse", "rows"),
    "cosine": ("cosine", "rows"),
    "norm": ("norm", "rows"),
    "norm_reconstructed": ("norm_hat", "rows"),
    "norm_ratio": ("norm_ratio", "rows"),
    "reconstruction_bias": ("square_hat", "product"),
}
FREQUENT = (1, 10)  # per cent of the rows on which a frequent latent fires
L0_QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


@dataclass(frozen=True, eq=False)
class HeldoutRows:
    """Held-out rows of a store, and what intervals and parts need to know of each."""

    rows: npt.NDArray[np.int64]
    """Numbers of the rows, in order [rows]."""

    is_outlier: npt.NDArray[np.bool_]
    """Whether training leaves the row out for its norm [rows]."""

    cluster: npt.NDArray[np.int64]
    """Cluster of the row's document [rows]; see `intervals`."""

    position: npt.NDArray[np.int64]
    """Position of the row in its context [rows]."""

    @classmethod
    def of(cls, store: ActivationStore, config: SAEConfig, rule: RowRule, most: int) -> HeldoutRows:
        """Return the first held-out rows of the store, `most` at most; see `heldout_rows`."""
        rows, classes = heldout_rows(store, config, rule, most)
        outlier = np.array([outlier for outlier, _ in CLASSES])
        return cls(
            rows, outlier[classes.numpy()], row_clusters(store, rows), rows % store.context_length
        )

    def part(self, name: str) -> npt.NDArray[np.bool_]:
        """Return the mask of the rows of a part, bool [rows]."""
        return ~self.is_outlier if name == "without outliers" else np.ones_like(self.is_outlier)


class Reconstruction:
    """Sums over rows that are added in any number of pieces, for one dictionary and one part."""

    def __init__(self, means: tuple[Floats, Floats], context_length: int, n_latents: int) -> None:
        """`means`: means of the rows, and of the rows normalised as in the paper, [d_out] each."""
        d = len(means[0])
        self._means = means
        self._sums = np.zeros((CLUSTERS, len(SUMS)))
        self._by_position = np.zeros((context_length, 3))  # rows, squared error, squared deviation
        self._by_dimension = np.zeros((d, 2))  # squared error, squared deviation
        self.n_fire = np.zeros(n_latents, np.int64)
        """Number of rows on which each latent fires, int64 [n_latents]."""
        self.l0 = np.zeros(1, np.int64)
        """Number of rows by their number of active latents, int64 [most active latents + 1]."""

    def update(
        self,
        x: npt.NDArray[np.float32],
        x_hat: npt.NDArray[np.float32],
        indices: npt.NDArray[np.int32],
        values: npt.NDArray[np.float32],
        cluster: npt.NDArray[np.int64],
        position: npt.NDArray[np.int64],
    ) -> None:
        """Add rows x [rows, d_out] with their reconstructions.

        Args:
            x, x_hat: float32 [rows, d_out].
            indices, values: int32 and float32 [rows, w], as `SAE.encode` returns them.
            cluster, position: int64 [rows].
        """
        wide, wide_hat = x.astype(np.float64), x_hat.astype(np.float64)
        error = np.square(wide - wide_hat)  # [rows, d_out]
        deviation = np.square(wide - self._means[0])
        row_error, row_deviation = error.sum(1), deviation.sum(1)  # [rows]
        own, own_hat = paper_normalised(wide, wide_hat)
        norm, norm_hat = np.linalg.norm(wide, axis=1), np.linalg.norm(wide_hat, axis=1)
        product = np.einsum("rd,rd->r", wide, wide_hat)
        l0 = (values > 0).sum(1)
        columns = {
            "rows": np.ones(len(x)),
            "l0": l0,
            "l1": values.sum(1, dtype=np.float64),
            "error": row_error,
            "deviation": row_deviation,
            "own_error": np.square(own - own_hat).sum(1),
            "own_deviation": np.square(own - self._means[1]).sum(1),
            "explained": 1 - row_error / np.maximum(row_deviation, TINY),
            "row_nmse": row_error / np.maximum(np.square(norm), TINY),
            "cosine": product / np.maximum(norm * norm_hat, TINY),
            "norm": norm,
            "norm_hat": norm_hat,
            "norm_ratio": norm_hat / np.maximum(norm, TINY),
            "square_hat": np.square(norm_hat),
            "product": product,
        }
        np.add.at(self._sums, cluster, np.stack([columns[name] for name in SUMS], axis=1))
        per_position = np.stack([np.ones(len(x)), row_error, row_deviation], axis=1)
        np.add.at(self._by_position, position, per_position)
        self._by_dimension += np.stack([error.sum(0), deviation.sum(0)], axis=1)
        self.n_fire += np.bincount(indices[values > 0], minlength=len(self.n_fire))
        counts = np.bincount(l0, minlength=len(self.l0))
        counts[: len(self.l0)] += self.l0
        self.l0 = counts

    @property
    def rows(self) -> int:
        """Number of rows."""
        return round(self._sums[:, 0].sum())

    @property
    def per_position(self) -> Floats:
        """FVU of the rows at each position, float64 [context_length]; NaN without rows."""
        return ratio(self._by_position[:, 1], self._by_position[:, 2])

    @property
    def per_dimension(self) -> Floats:
        """FVU of each dimension, float64 [d_out]; NaN if it does not vary."""
        return ratio(self._by_dimension[:, 0], self._by_dimension[:, 1])

    def figures(self, subject: str, part: str) -> Iterator[Figure]:
        """Yield the figures of the rows that were added."""
        for name, quotient in METRICS.items():
            above, below = map(SUMS.index, quotient)
            of_sums = partial(_quotient, above=above, below=below)
            yield figure_of_sums(name, subject, part, self._sums, of_sums, self.rows, "rows")
        dead = float((self.n_fire == 0).mean()) if self.rows else None
        yield Figure("dead_share", subject, part, dead, None, None, self.rows, "rows")
        yield from self._frequent(subject, part)
        for share in L0_QUANTILES if self.rows else ():
            at = int(np.searchsorted(np.cumsum(self.l0), share * self.rows))
            name = f"l0_q{round(100 * share):02d}"
            yield Figure(name, subject, part, float(at), None, None, self.rows, "rows")

    def _frequent(self, subject: str, part: str) -> Iterator[Figure]:
        """Yield the share of latents that fire often, and their share of all firings."""
        often = {percent: self.n_fire > percent / 100 * self.rows for percent in FREQUENT}
        for percent, mask in often.items() if self.rows else ():
            firings = float(self.n_fire[mask].sum() / max(1, self.n_fire.sum()))
            for name, value in (
                (f"frequent_{percent}", float(mask.mean())),
                (f"firings_of_frequent_{percent}", firings),
            ):
                yield Figure(name, subject, part, value, None, None, self.rows, "rows")


def reconstruction(
    saes: Mapping[str, SAE],
    store: ActivationStore,
    held_out: HeldoutRows,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[tuple[str, str], Reconstruction]:
    """Reconstruct held-out rows by several dictionaries of the same sites.

    Args:
        saes: dictionaries by name, such as an SAE and its baselines.
        store: the store that holds the rows.
        held_out: the rows.
        progress: called with rows done and rows to do; the rows are read twice.

    Returns:
        The sums of each dictionary and part of the rows, by both names.

    Raises:
        DamagedError: a row is not finite, or an object of the store is damaged.
    """
    config = next(iter(saes.values())).config
    total = 2 * len(held_out.rows)
    masks = {part: held_out.part(part) for part in PARTS}
    moments = {part: [Moments.empty(config.width_out) for _ in range(2)] for part in PARTS}
    for here, _, wanted in batches(store, config, held_out.rows):
        x = wanted.numpy()
        own = paper_normalised(x.astype(np.float64))[0].astype(np.float32)
        for part, mask in masks.items():
            for number, rows in enumerate((x, own)):
                new = Moments.of(rows[mask[here]])
                moments[part][number] = moments[part][number].merge(new)
        progress(here.stop, total)
    found = {
        (name, part): Reconstruction(
            (of_part[0].mean, of_part[1].mean), store.context_length, sae.config.n_latents
        )
        for name, sae in saes.items()
        for part, of_part in moments.items()
    }
    for here, x_in, wanted in batches(store, config, held_out.rows):
        for name, sae in saes.items():
            indices, values = sae.encode(x_in)
            x_hat = sae.decode(indices, values, x_in)
            arrays: list[npt.NDArray[Any]] = [
                tensor.cpu().numpy() for tensor in (wanted, x_hat, indices, values)
            ]
            arrays += [held_out.cluster[here], held_out.position[here]]
            for part, mask in masks.items():
                found[name, part].update(*(array[mask[here]] for array in arrays))
        progress(len(held_out.rows) + here.stop, total)
    return found


def paper_normalised(x: Floats, x_hat: Floats | None = None) -> tuple[Floats, Floats]:
    """Subtract from rows [rows, d] the mean of their own numbers, and divide them by their norm.

    `x_hat` is normalised by mean and norm of `x`, as the paper's decoder works in these units.
    """
    mean = x.mean(1, keepdims=True)
    norm = np.maximum(np.linalg.norm(x - mean, axis=1, keepdims=True), TINY)
    return (x - mean) / norm, (x if x_hat is None else x_hat - mean) / norm


def _quotient(sums: Floats, above: int, below: int) -> Floats:
    """Divide one column of the sums [..., columns] by another."""
    return ratio(sums[..., above], sums[..., below])
