"""A latent's page; it reads the rows of one latent from each table."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise
from typing import Any

from sae_harvest.pipelines.features.tables.checks import (
    check_context,
    check_histogram,
    check_latent,
)
from sae_harvest.pipelines.features.tables.folder import DECILES
from sae_harvest.pipelines.viewer.explained import explained
from sae_harvest.pipelines.viewer.tables import Tables, plain

MERGED_BINS = 4  # bins per bar; tables have 16 bins an octave, too many for a small plot
STRATA = (
    "top", *(f"decile_{d}" for d in range(DECILES, 0, -1)), "random", "hard_negative", "inactive",
)  # fmt: skip
BIN = "bin, low, high, count"
NEIGHBOUR = "other, decoder_cosine, cofire, jaccard, cosine_rank, cofire_rank"
CONTEXT = (
    "stratum, rank, reason, split, activation, row, document, position, "
    "position - window_start AS place, text, token_ends, activations"
)
STATISTICS = "SELECT * FROM latents WHERE latent = ?"
HISTOGRAM = f"SELECT {BIN} FROM histograms WHERE latent = ? ORDER BY bin"
NEIGHBOURS = f"SELECT {NEIGHBOUR} FROM neighbours WHERE latent = ?"
CONTEXTS = f"SELECT {CONTEXT} FROM contexts WHERE latent = ?"


def latent_page(tables: Tables, latent: int) -> dict[str, Any]:
    """Return all data of a latent's page.

    Raises:
        InputError: there is no such latent.
        RunError: the tables contradict each other.
    """
    tables.check(latent)
    statistics = tables.ask(STATISTICS, latent)
    contexts = tables.ask(CONTEXTS, latent)
    documents = tables.titles([c["document"] for c in contexts])
    near = tables.ask(NEIGHBOURS, latent)
    return assemble(
        tables,
        statistics[0],
        tables.ask(HISTOGRAM, latent),
        near,
        contexts,
        documents,
        tables.labels([latent, *(n["other"] for n in near)]),
        tables.explanations(latent, latent).get(latent),
        tables.programs(latent, latent).get(latent, []),
        explained(tables, latent, latent).get(latent),
    )


def assemble(
    tables: Tables,
    statistics: dict[str, Any],
    histogram: list[dict[str, Any]],
    near: list[dict[str, Any]],
    contexts: list[dict[str, Any]],
    documents: dict[int, dict[str, Any]],
    labels: dict[int, dict[str, Any]],
    explanation: str | None,
    programs: list[dict[str, Any]],
    scored: dict[str, Any] | None,
) -> dict[str, Any]:
    """Assemble a latent's page from rows of the tables; `RunError` if they contradict."""
    latent = statistics["latent"]
    check_latent(tables.features, statistics)
    bins = [tuple(row.values()) for row in histogram]
    check_histogram(tables.features, latent, bins, fires=not statistics["dead"])
    for c in contexts:
        check_context(
            tables.features, latent, c["stratum"], c["place"], c["text"], c["token_ends"],
            c["activations"],
        )  # fmt: skip
    contexts = sorted(contexts, key=lambda c: (STRATA.index(c["stratum"]), c["rank"] or 0))
    used = {c["document"] for c in contexts}
    return {
        "latent": latent,
        "label": labels.get(latent, {}).get("label"),
        "explanation": explanation,
        "explained": scored,
        "programs": programs,
        "statistics": statistics,
        "histogram": merged(histogram),
        "neighbours": {
            "cosine": _ranked(near, "cosine_rank", labels),
            "cofire": _ranked(near, "cofire_rank", labels),
        },
        "contexts": [compact(context) for context in contexts],
        "documents": {str(d): documents[d] for d in sorted(used & documents.keys())},
    }


def compact(context: dict[str, Any]) -> dict[str, Any]:
    """Replace a context's token ends and activations by `lengths` and `heat`.

    `lengths` holds the code points of each token; `heat` holds [place, activation] pairs where the
    activation is not 0.
    """
    ends, activations = context.pop("token_ends"), context.pop("activations")
    return context | {
        "lengths": [end - start for start, end in pairwise([0, *ends])],
        "heat": [[at, plain(a)] for at, a in enumerate(activations) if a],
    }


def merged(histogram: Iterable[dict[str, Any]]) -> list[list[float]]:
    """Merge every `MERGED_BINS` bins: [low, high, count] of each that is not empty, in order."""
    bins: dict[int, list[float]] = {}
    for row in histogram:
        low, high, count = row["low"], row["high"], row["count"]
        found = bins.setdefault(row["bin"] // MERGED_BINS, [low, high, 0])
        found[1] = high
        found[2] += count
    return list(bins.values())


def _ranked(
    near: list[dict[str, Any]], rank: str, labels: dict[int, dict[str, Any]]
) -> list[dict[str, Any]]:
    chosen = sorted((n for n in near if n[rank] is not None), key=lambda n: n[rank])
    return [
        {key: n[key] for key in ("other", "decoder_cosine", "cofire", "jaccard")}
        | name_of(labels, n["other"])
        for n in chosen
    ]


def name_of(labels: dict[int, dict[str, Any]], latent: int) -> dict[str, Any]:
    """Return what lists show of a latent: its label, if there is one, and its tokens."""
    known = labels.get(latent, {})
    return {"tokens": known.get("tokens", []), "label": known.get("label")}
