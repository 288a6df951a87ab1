"""Two SAEs side by side: for each latent of one, the nearest latent of the other."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from sae_harvest.common.errors import InputError
from sae_harvest.pipelines.source import sae_of
from sae_harvest.pipelines.viewer.tables import Tables, plain

BLOCK = 1024  # decoder rows compared at a time


class Comparison:
    """Nearest latents by the cosine between decoder rows.

    Raises:
        InputError: the SAEs cannot be loaded, or write to spaces of different width.
    """

    def __init__(self, ours: Tables, theirs: Tables, saes: Sequence[Path] = ()) -> None:
        """Compare the SAEs of two folders of tables; `saes`: their folders, if they have moved."""
        self.ours, self.theirs = ours, theirs
        mine, other = (sae_of(one.features, one.run, saes).W_dec for one in (ours, theirs))
        if mine.shape[1] != other.shape[1]:
            raise InputError(
                f"{ours.features} has an SAE with {mine.shape[1]} dimensions and "
                f"{theirs.features} one with {other.shape[1]}; compare SAEs of one site."
            )
        nearest, cosine = nearest_rows(mine, other)
        self.cosine = np.array(
            plain(cosine.tolist())
        )  # rounded as shown, so that a filter agrees with the page
        self._pairs = [
            {"latent": a, "other": b, "cosine": c}
            for a, (b, c) in enumerate(zip(nearest.tolist(), self.cosine.tolist(), strict=True))
        ]

    def of(self, latent: int) -> dict[str, Any]:
        """Return the other SAE's latent nearest to one of ours, with its label."""
        pair = self._pairs[latent]
        return pair | {"label": self.theirs.labels([pair["other"]]).get(pair["other"])}

    def overview(self) -> dict[str, Any]:
        """Return the similarity of the two SAEs as a whole."""
        edges = np.linspace(min(0.0, float(self.cosine.min())), 1, 41)
        counts, _ = np.histogram(np.clip(self.cosine, edges[0], 1), edges)
        return {
            "name": self.theirs.name,
            "differences": differences(self.ours.run, self.theirs.run),
            "run": {k: plain(v) for k, v in self.theirs.run.items()},
            "n_latents": self.theirs.n_latents,
            "median": plain(float(np.median(self.cosine))),
            "above_90": plain(float((self.cosine > 0.9).mean())),
            "cosines": {"edges": plain(edges.tolist()), "counts": counts.tolist(), "log": False},
        }

    def columns(self) -> dict[str, list[Any]]:
        """Return `latent`, `other` and `cosine` of every pair, as columns."""
        return {key: [p[key] for p in self._pairs] for key in ("latent", "other", "cosine")}

    def rows(
        self,
        descending: bool,
        low: float | None,
        high: float | None,
        offset: int,
        limit: int,
    ) -> dict[str, Any]:
        """Return a page of the pairs, sorted by cosine; `total` counts the pairs in the range."""
        order = np.argsort(-self.cosine if descending else self.cosine, kind="stable")
        kept = np.ones(len(order), bool)
        if low is not None:
            kept &= self.cosine[order] >= low
        if high is not None:
            kept &= self.cosine[order] <= high
        chosen = [self._pairs[i] for i in order[kept][offset : offset + limit].tolist()]
        ours = self.ours.labels([p["latent"] for p in chosen])
        theirs = self.theirs.labels([p["other"] for p in chosen])
        return {
            "total": int(kept.sum()),
            "offset": offset,
            "rows": [
                p | {"ours": ours.get(p["latent"]), "theirs": theirs.get(p["other"])}
                for p in chosen
            ],
        }


def differences(ours: dict[str, Any], theirs: dict[str, Any]) -> list[str]:
    """Return a sentence for each difference of model, site and store that limits comparison."""
    found = []
    if ours.get("model") != theirs.get("model"):
        found.append(
            f"The models are {ours.get('model')} and {theirs.get('model')}: unless these are two "
            "names of one model, their directions have nothing to do with each other."
        )
    if ours.get("site") != theirs.get("site"):
        found.append(
            f"The sites are {ours.get('site')} and {theirs.get('site')}: a latent of one site may "
            "have no counterpart at the other."
        )
    if ours.get("store_digest") != theirs.get("store_digest"):
        found.append(
            f"The tables come from two stores, {ours.get('store')} and {theirs.get('store')}: "
            "densities, tokens and maxima can only be compared if both stores hold the same texts; "
            "cosines can be compared anyway."
        )
    return found


def nearest_rows(
    rows: torch.Tensor, others: torch.Tensor
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
    """Find the nearest of `others` [m, d] for each of `rows` [n, d]: index and cosine, both [n]."""
    others = torch.nn.functional.normalize(others, dim=1)
    index = torch.empty(len(rows), dtype=torch.int64)
    cosine = torch.empty(len(rows))
    for start in range(0, len(rows), BLOCK):
        block = torch.nn.functional.normalize(rows[start : start + BLOCK], dim=1)
        best = (block @ others.T).max(dim=1)  # [block]
        cosine[start : start + BLOCK], index[start : start + BLOCK] = best.values, best.indices
    return index.numpy(), cosine.clamp(-1, 1).numpy()
