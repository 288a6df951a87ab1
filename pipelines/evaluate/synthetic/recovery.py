"""The share of a synthetic store's truth that a dictionary has found.

Each true feature is matched to one latent, so that the sum of the cosines of directions and decoder
rows is largest. With both, fired and true the numbers of held-out rows on which feature and latent,
the latent, the feature fire:

    matched_cosine      mean cosine of features and their latents; 0 for a feature without one
    found_share         share of features whose cosine exceeds 0.9
    children_found      the same of features with a parent
    rare_found          the same of the rarest quarter of features
    feature_max_cosine  mean over features of the largest cosine with any latent
    latent_max_cosine   mean over latents of the largest cosine with any feature
    precision           mean over features of both / fired, where the latent fires at all
    recall              mean over features of both / true, where the feature fires at all
    f1                  mean over features of 2 both / (fired + true)
    dead_share          share of latents that fire on no row
    absorption          of the rows on which a child and its latent fire, the share on which the
                        parent's latent is silent, although the parent fires
    parent_missed       of the rows on which a parent fires without a child, the share on which its
                        latent is silent: what absorption would be if children had no part in it

Intervals are over features or latents. Those of the last two are over documents. The largest
cosines are the mean max cosine similarity of Sharkey et al. (2022); absorption is described by
Chanin et al. (2024), who have to find it with probes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from sae_harvest.common.errors import InputError
from sae_harvest.pipelines.evaluate.baselines import MEAN, baselines
from sae_harvest.pipelines.evaluate.figures import SAE_ITSELF, Figure, figure_of_sums
from sae_harvest.pipelines.evaluate.intervals import CLUSTERS, Floats, ratio
from sae_harvest.pipelines.evaluate.reconstruction import PARTS, HeldoutRows, reconstruction
from sae_harvest.pipelines.evaluate.synthetic.ideal import firings_of, ideal_sae
from sae_harvest.pipelines.evaluate.synthetic.matching import match
from sae_harvest.train.evaluate import batches
from sae_harvest.train.sae.sae import SAE
from sae_harvest.train.synthetic.store import Synthetic
from sae_harvest.train.synthetic.truth import Features

IDEAL = "ideal"
FOUND = 0.9  # cosine above which a feature counts as found
MAX_ROWS = 262_144
PART = PARTS[0]
BOTH, FIRED, TRUE = range(3)

Bools = npt.NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class Match:
    """Features and latents by their directions."""

    latent: npt.NDArray[np.int64]
    """Latent of each feature [features]; -1: none, if there are more features than latents."""

    cosine: Floats
    """Cosine of each feature and its latent [features]; 0 without one."""

    feature_max: Floats
    """Largest cosine of each feature with any latent [features]."""

    latent_max: Floats
    """Largest cosine of each latent with any feature [latents]; 0 for a decoder row of zeros."""

    @classmethod
    def of(cls, sae: SAE, features: Features) -> Match:
        """Match the features to the latents of a dictionary."""
        rows = torch.nn.functional.normalize(sae.W_dec.cpu(), dim=1)
        cosine = (torch.from_numpy(features.directions) @ rows.T).numpy()  # [features, latents]
        latent = match(cosine)
        matched = np.where(latent < 0, 0.0, cosine[np.arange(len(latent)), latent])
        maxima = (cosine.max(axis).astype(np.float64) for axis in (1, 0))
        return cls(latent, matched, *maxima)


class Recovery:
    """Features that a dictionary has found; rows are added in any number of pieces."""

    def __init__(self, sae: SAE, features: Features) -> None:
        self.match = Match.of(sae, features)
        rarest = np.argsort(features.frequency, kind="stable")
        self._rare = rarest[: max(1, len(features) // 4)]
        self._feature_of = np.full(sae.config.n_latents, -1, np.int64)
        self._feature_of[self.match.latent[self.match.latent >= 0]] = np.flatnonzero(
            self.match.latent >= 0
        )
        children = np.flatnonzero(features.parent >= 0)
        self._children = children[np.argsort(features.parent[children], kind="stable")]
        self._parents = features.parent[self._children]
        self._families = np.flatnonzero(np.diff(self._parents, prepend=-1))  # first child of each
        self.firings = np.zeros((len(features), 3), np.int64)
        """Rows on which both, the latent, the feature fire [features, 3]."""
        self.hierarchy = np.zeros((CLUSTERS, 4))
        """By cluster of documents, firings of a child and its latent: those without the parent's
        latent, and all; firings of a parent without a child: those without its latent, and all."""
        self.n_fire = np.zeros(sae.config.n_latents, np.int64)
        """Number of rows on which each latent fires [latents]."""
        self.rows = 0
        """Number of rows."""

    def update(
        self,
        indices: npt.NDArray[np.int32],
        values: npt.NDArray[np.float32],
        true: Bools,
        cluster: npt.NDArray[np.int64],
    ) -> None:
        """Add rows.

        Args:
            indices, values: int32 and float32 [rows, w], as `SAE.encode` returns them.
            true: whether each feature fires, bool [rows, features].
            cluster: cluster of the row's document, int64 [rows].
        """
        if not len(true):
            return
        row, place = np.nonzero(values > 0)
        latent = indices[row, place]
        self.n_fire += np.bincount(latent, minlength=len(self.n_fire))
        feature = self._feature_of[latent]
        fired = np.zeros_like(true)
        fired[row[feature >= 0], feature[feature >= 0]] = True
        for column, mask in ((BOTH, fired & true), (FIRED, fired), (TRUE, true)):
            self.firings[:, column] += np.count_nonzero(mask, axis=0)
        np.add.at(self.hierarchy, cluster, self._of_families(fired, true))
        self.rows += len(true)

    def _of_families(self, fired: Bools, true: Bools) -> npt.NDArray[np.int64]:
        """Return the columns of `hierarchy` for each row, int64 [rows, 4]."""
        if not len(self._children):
            return np.zeros((len(true), 4), np.int64)
        child = true[:, self._children]  # [rows, children]
        known = child & fired[:, self._children]
        absorbed = known & ~fired[:, self._parents]
        parents = self._parents[self._families]
        alone = true[:, parents] & ~np.logical_or.reduceat(child, self._families, axis=1)
        missed = alone & ~fired[:, parents]
        return np.stack([mask.sum(1) for mask in (absorbed, known, missed, alone)], axis=1)

    def figures(self, subject: str) -> Iterator[Figure]:
        """Yield the figures."""
        found = self.match
        exceeds = (found.cosine > FOUND).astype(np.float64)
        both, fired, true = self.firings.T.astype(np.float64)
        for name, values in {
            "matched_cosine": found.cosine,
            "found_share": exceeds,
            "children_found": exceeds[self._children],
            "rare_found": exceeds[self._rare],
            "feature_max_cosine": found.feature_max,
            "latent_max_cosine": found.latent_max,
            "precision": ratio(both, fired),
            "recall": ratio(both, true),
            "f1": ratio(2 * both, fired + true),
        }.items():
            values = values[np.isfinite(values)]
            unit = "latents" if name == "latent_max_cosine" else "features"
            sums = np.stack([values, np.ones_like(values)], axis=1)
            yield _figure(name, subject, sums, len(values), unit)
        dead = float((self.n_fire == 0).mean()) if self.rows else None
        yield Figure("dead_share", subject, PART, dead, None, None, self.rows, "rows")
        for name, columns in (("absorption", slice(0, 2)), ("parent_missed", slice(2, 4))):
            sums = self.hierarchy[:, columns]
            yield _figure(name, subject, sums, round(sums[:, 1].sum()), "firings")


def recoveries(
    saes: Mapping[str, SAE],
    synthetic: Synthetic,
    held_out: HeldoutRows,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Recovery]:
    """Compare the firings of several dictionaries with the true ones, on held-out rows.

    Args:
        saes: dictionaries by name.
        synthetic: the store and what is true of it.
        held_out: the rows; outlier rows are left out.
        progress: called with rows done and rows to do.

    Returns:
        What each dictionary has found, by its name.

    Raises:
        InputError: a dictionary was trained on another site or width.
        RunError: a file of the ground truth is missing or damaged.
    """
    found = {name: Recovery(sae, synthetic.features) for name, sae in saes.items()}
    config = next(iter(saes.values())).config
    mask = held_out.part(PART)
    rows, cluster = held_out.rows[mask], held_out.cluster[mask]
    row, feature, _ = firings_of(synthetic, rows)
    for here, x, _ in batches(synthetic.store, config, rows):
        first, last = np.searchsorted(row, (here.start, here.stop))
        true = np.zeros((len(x), len(synthetic.features)), np.bool_)
        true[row[first:last] - here.start, feature[first:last]] = True
        for name, sae in saes.items():
            indices, values = (tensor.cpu().numpy() for tensor in sae.encode(x))
            found[name].update(indices, values, true, cluster[here])
        progress(here.stop, len(rows))
    return found


def recovery_figures(
    sae: SAE, synthetic: Synthetic, most: int = MAX_ROWS, seed: int = 0
) -> list[Figure]:
    """Return FVU, L0 and every recovery figure of an SAE, its baselines and the ideal SAE.

    Args:
        sae: an SAE that was trained on the synthetic store.
        synthetic: the store and what is true of it.
        most: largest number of held-out rows to read.
        seed: seed of the baselines.

    Raises:
        InputError: the SAE was trained on another site or width, or no row is held out, or none is
            for training.
        RunError: a file of the ground truth is missing or damaged.
    """
    store = synthetic.store
    width = store.width(store.site(sae.config.site))
    if sae.config.d_in != width:
        raise InputError(
            f"The SAE reads {sae.config.d_in} dimensions and the rows of {store.place} have "
            f"{width}; give an SAE that was trained on this store."
        )
    held_out = HeldoutRows.of(store, sae.config, sae.config.rule, most)
    if not held_out.part(PART).any():
        raise InputError(
            f"{store.place} holds no row of a held-out document; train with a larger "
            "--heldout-fraction, or make a store with more --rows."
        )
    saes = {SAE_ITSELF: sae} | references(sae, synthetic, held_out, seed)
    return compared(saes, synthetic, held_out)


def references(
    sae: SAE, synthetic: Synthetic, held_out: HeldoutRows, seed: int = 0
) -> dict[str, SAE]:
    """Return the dictionaries to print beside an SAE: its baselines and the ideal SAE.

    The mean is not among them, as it has no directions. See `recovery_figures` for arguments.
    """
    found = reconstruction({SAE_ITSELF: sae}, synthetic.store, held_out)[SAE_ITSELF, PART]
    l0 = next(figure.value for figure in found.figures(SAE_ITSELF, PART) if figure.metric == "l0")
    saes = baselines(synthetic.store, sae, l0 or 1.0, seed)
    del saes[MEAN]
    return saes | {IDEAL: ideal_sae(synthetic, sae.config.rule).to(sae.device)}


def compared(saes: Mapping[str, SAE], synthetic: Synthetic, held_out: HeldoutRows) -> list[Figure]:
    """Return FVU, L0 and every recovery figure of dictionaries, by their names."""
    reconstructed = reconstruction(saes, synthetic.store, held_out)
    figures = [
        figure
        for name in saes
        for figure in reconstructed[name, PART].figures(name, PART)
        if figure.metric in ("fvu", "l0")
    ]
    for name, found in recoveries(saes, synthetic, held_out).items():
        figures += found.figures(name)
    return figures


def _figure(metric: str, subject: str, sums: Floats, count: int, unit: str) -> Figure:
    """Return the figure of a quotient of sums [clusters, 2]; None where it is not defined."""
    return figure_of_sums(metric, subject, PART, sums, _quotient, count, unit)


def _quotient(sums: Floats) -> Floats:
    return ratio(sums[..., 0], sums[..., 1])
