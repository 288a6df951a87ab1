"""Programs of latents, from `programs.parquet`, applied to excerpts: what prose has to beat."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq

from sae_harvest.common.errors import RunError
from sae_harvest.pipelines.evaluate.programs.forms import ANY
from sae_harvest.pipelines.evaluate.programs.suffixes import START
from sae_harvest.pipelines.explain.excerpts import Excerpt
from sae_harvest.pipelines.features.tables.folder import PROGRAMS

COLUMNS = ["latent", "kind", "program", "threshold", "patterns", "predictions", "f1"]


@dataclass(frozen=True, eq=False)
class LatentProgram:
    """A program of one latent."""

    kind: str
    """tokens, ngrams, n2g or n2g_exceptions."""

    text: str
    """The program as text."""

    threshold: float
    """Prediction from which a firing is predicted; infinite if none is."""

    patterns: Sequence[tuple[int, ...]]
    """Token ids of each pattern, the row's own token last."""

    predictions: Sequence[float]
    """Predicted activation of each pattern."""

    f1: float | None
    """F1 on all held-out rows of the store."""

    def predict(self, excerpt: Excerpt) -> npt.NDArray[np.float64]:
        """Return the predicted activation on each token, float64 [tokens].

        Only the tokens of the excerpt are known; a pattern that begins before it does not match.
        """
        ids = excerpt.ids
        found = np.zeros(len(ids))
        for place, token in enumerate(ids):
            for number in self._by_last.get(token, ()):
                if _matches(self.patterns[number], ids, place, excerpt.starts_context):
                    found[place] = self.predictions[number]
                    break
        return found

    @cached_property
    def _by_last(self) -> Mapping[int, list[int]]:
        """Patterns by their last token, in the order in which they decide."""

        def order(number: int) -> tuple[int, int, float]:
            pattern = self.patterns[number]
            return -sum(t != ANY for t in pattern), -len(pattern), -self.predictions[number]

        found: dict[int, list[int]] = defaultdict(list)
        every = sorted(range(len(self.patterns)), key=order)
        for number in every:
            found[self.patterns[number][-1]].append(number)
        return found


def _matches(
    pattern: tuple[int, ...], ids: tuple[int, ...], place: int, starts_context: bool
) -> bool:
    """Return whether a pattern matches the tokens that end at a place."""
    for back, token in enumerate(reversed(pattern)):
        at = place - back
        if token == ANY:
            continue
        if token == START:
            if at != -1 or not starts_context:
                return False
        elif at < 0 or ids[at] != token:
            return False
    return True


def programs_of(features: Path, latents: Sequence[int]) -> dict[int, list[LatentProgram]]:
    """Read the programs of latents; empty lists if the tables have no programs.

    Raises:
        RunError: the table is damaged.
    """
    found: dict[int, list[LatentProgram]] = {latent: [] for latent in latents}
    path = features / f"{PROGRAMS}.parquet"
    if not path.is_file():
        return found
    try:
        table = pq.read_table(path, columns=COLUMNS, filters=[("latent", "in", list(latents))])
    except (OSError, ValueError) as error:
        raise RunError(
            f"{path} cannot be read ({error}); write it again by `sae-features programs`."
        ) from error
    for row in table.to_pylist():
        found[row["latent"]].append(
            LatentProgram(
                row["kind"],
                row["program"],
                np.inf if row["threshold"] is None else row["threshold"],
                [tuple(pattern) for pattern in row["patterns"]],
                row["predictions"],
                row["f1"],
            )
        )
    return found
