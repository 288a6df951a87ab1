"""Receipts: the scores of an explanation, computed again from store, firings and answers.

Activations and documents are read from the store and from the firings, not from the tables of
explanations; the answers of the language model are those in the tables.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from sae_harvest.common.errors import InputError, RunError
from sae_harvest.common.parsing import first_line
from sae_harvest.pipelines.explain.excerpts import EvidenceSource
from sae_harvest.pipelines.explain.scores import OF_EXCERPTS, OF_TOKENS, Items, Score, score_of
from sae_harvest.pipelines.explain.tasks import ACTIVE, DETECTION, FUZZING, TOP_FIRINGS
from sae_harvest.pipelines.features.reading.labels import ALL_FIRINGS, SIMULATION
from sae_harvest.pipelines.features.tables.folder import (
    EXPLANATIONS,
    QUESTIONS,
    SCORES,
    SIMULATIONS,
    firing_files,
)
from sae_harvest.pipelines.source import NOTHING_MOVED, Locations

CLOSE = 1e-6
SUBJECT = "explanation"


@dataclass(frozen=True)
class Checked:
    """One score, as it is in the table and as it was computed again."""

    task: str
    """simulation, detection or fuzzing."""

    part: str
    """Its part."""

    metric: str
    """Its metric."""

    recorded: float | None
    """The value in the table."""

    derived: Score
    """The value computed again."""

    @property
    def holds(self) -> bool:
        """True if both are the same."""
        if self.recorded is None or self.derived.value is None:
            return self.recorded is self.derived.value
        return abs(self.recorded - self.derived.value) <= CLOSE


@dataclass(frozen=True)
class Receipt:
    """An explanation with all that its scores rest on."""

    explanation: dict[str, Any]
    """Its row in the table of explanations."""

    scores: Sequence[Checked]
    """Its scores."""

    differences: Sequence[str]
    """Sentences about what is no longer as it was; empty if all is."""

    @property
    def holds(self) -> bool:
        """True if every score and everything that it rests on is as it was."""
        return not self.differences and all(score.holds for score in self.scores)


def receipt(features: Path, identity: str, moved: Locations = NOTHING_MOVED) -> Receipt:
    """Compute the scores of an explanation again.

    Args:
        features: folder of the tables.
        identity: `id` of a scored explanation, or its beginning.
        moved: new place of the store, if it has moved.

    Raises:
        InputError: there is no such explanation, or there are several.
        RunError: a table or the store is missing or damaged.
    """
    explanation = _explanation(features, identity)
    source = EvidenceSource(features, 1, moved)
    latent, number = explanation["latent"], explanation["id"]
    wanted = [("latent", "=", latent), ("id", "=", number)]
    simulations = _rows(features, SIMULATIONS, wanted)
    questions = _rows(features, QUESTIONS, [*wanted, ("subject", "=", SUBJECT)])
    recorded = {
        (row["task"], row["part"], row["metric"]): row["value"]
        for row in _rows(features, SCORES, [*wanted, ("subject", "=", SUBJECT)])
    }
    if not recorded:
        raise InputError(
            f"The explanation {number} of latent {latent} has no scores: it was not chosen, so "
            "there is nothing to derive."
        )
    differences: list[str] = []
    derived = {
        **_of_simulations(source, latent, simulations, differences),
        **_of_questions(source, questions),
    }
    scores = [
        Checked(*key, value, derived.get(key, Score(None))) for key, value in recorded.items()
    ]
    return Receipt(explanation, scores, differences)


def _explanation(features: Path, identity: str) -> dict[str, Any]:
    if not (features / f"{EXPLANATIONS}.parquet").is_file():
        raise InputError(f"{features} holds no explanations; run `sae-features explain` first.")
    rows = _rows(features, EXPLANATIONS, None)
    rows.sort(key=lambda row: bool(row.get("chosen")))  # of equal texts, the chosen one
    found = {row["id"]: row for row in rows if row.get("id") and row["id"].startswith(identity)}
    if len(found) != 1:
        what = "no explanation" if not found else f"{len(found)} explanations"
        raise InputError(
            f"{features} has {what} with the id {identity!r:.40}; give the column id of "
            "explanations.parquet."
        )
    (row,) = found.values()
    return row


def _rows(features: Path, name: str, filters: Any) -> list[dict[str, Any]]:
    path = features / f"{name}.parquet"
    try:
        return pq.read_table(path, filters=filters).to_pylist()
    except (OSError, ValueError) as error:
        raise RunError(
            f"{path} cannot be read ({first_line(error)}); explain the latents again."
        ) from error


def _of_simulations(
    source: EvidenceSource,
    latent: int,
    rows: Sequence[dict[str, Any]],
    differences: list[str],
) -> dict[tuple[str, str, str], Score]:
    """Compute the scores of a simulation from the firings; note what differs."""
    firings = _firings(source.features, latent)
    kinds = {"top": (TOP_FIRINGS,), "inactive": (TOP_FIRINGS, ALL_FIRINGS)}
    truth: dict[str, list[Any]] = {TOP_FIRINGS: [], ALL_FIRINGS: []}
    for row in rows:
        first, n = row["first_row"], len(row["tokens"])
        activations = np.array([firings.get(first + i, 0.0) for i in range(n)], np.float32)
        documents = source.documents(first, first + n)
        if not np.array_equal(activations, np.array(row["activations"], np.float32)):
            differences.append(f"The activations of rows {first} to {first + n - 1} differ.")
        if set(documents.tolist()) != {row["document"]}:
            differences.append(f"The document of rows {first} to {first + n - 1} differs.")
        if row["simulated"] is None:
            continue
        for part in kinds.get(row["stratum"], (ALL_FIRINGS,)):
            truth[part].append((activations, documents, np.array(row["simulated"])))
    found = {}
    for part, some in truth.items():
        y, document, s = (
            np.concatenate([np.empty(0), *(one[k] for one in some)]) for k in range(3)
        )
        items = Items(y.astype(np.float64), document.astype(np.int64))
        for metric, measure in OF_TOKENS.items():
            values = measure(items, s, 0.0) if len(y) else np.array([np.nan])
            found[SIMULATION, part, metric] = score_of(values)
    return found


def _of_questions(
    source: EvidenceSource, rows: Sequence[dict[str, Any]]
) -> dict[tuple[str, str, str], Score]:
    """Compute the scores of detection and fuzzing from the answers."""
    found = {}
    for task in (DETECTION, FUZZING):
        here = [row for row in rows if row["task"] == task and row["probabilities"] is not None]
        for part in {row["part"] for row in here} - {ACTIVE}:
            some = [row for row in here if row["part"] in (ACTIVE, part)]
            truth = np.array([row["part"] == ACTIVE for row in some], np.float64)
            document = [int(source.documents(r["rows"][0], r["rows"][0] + 1)[0]) for r in some]
            items = Items(truth, np.array(document, np.int64))
            yes = np.array([row["probabilities"][0] for row in some])
            for metric, measure in OF_EXCERPTS.items():
                found[task, part, metric] = score_of(measure(items, yes, 0.5))
    return found


def _firings(features: Path, latent: int) -> dict[int, float]:
    """Read all firings of a latent: row → activation."""
    found: dict[int, float] = {}
    for table in _tables(features, latent):
        rows, values = (table[name].to_pylist() for name in ("row", "value"))
        found |= zip(rows, values, strict=True)
    return found


def _tables(features: Path, latent: int) -> Iterator[Any]:
    for path in firing_files(features):
        yield pq.read_table(path, filters=[("latent", "=", latent)])
