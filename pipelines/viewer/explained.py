"""Scores of explanations and their simulations, as a latent's page shows them."""

from __future__ import annotations

from typing import Any

from sae_harvest.pipelines.viewer.tables import Tables

SIMULATED = 12  # simulated excerpts of a latent that are shown
SCORES = """
    SELECT latent, subject, task, part, metric, value, low, high, items, failed
    FROM scores WHERE latent BETWEEN ? AND ? AND metric IN ('pearson', 'auprc', 'accuracy')
"""
SIMULATIONS = f"""
    SELECT latent, row, document, tokens, activations, simulated
    FROM simulations
    WHERE latent BETWEEN ? AND ? AND simulated IS NOT NULL
        AND id IN (SELECT id FROM explanations WHERE chosen AND latent BETWEEN ? AND ?)
    QUALIFY row_number() OVER (
        PARTITION BY latent ORDER BY list_max(activations) DESC, row) <= {SIMULATED}
    ORDER BY latent, list_max(activations) DESC, row
"""


def explained(tables: Tables, first: int, last: int) -> dict[int, dict[str, Any]]:
    """Return, for latents with scored explanations, their scores and simulated excerpts.

    A line of the scores has a task, a part and a metric, and for each subject value, limits, items
    and the number of failed questions.
    """
    found: dict[int, dict[str, Any]] = {}
    if not tables.has_scores:
        return found
    lines: dict[tuple[int, str, str, str], dict[str, Any]] = {}
    for row in tables.ask(SCORES, first, last):
        latent, task, part, metric = (row[key] for key in ("latent", "task", "part", "metric"))
        if (latent, task, part, metric) not in lines:
            line: dict[str, Any] = {"task": task, "part": part, "metric": metric, "subjects": {}}
            lines[latent, task, part, metric] = line
            entry = found.setdefault(latent, {"scores": [], "simulations": []})
            entry["scores"].append(line)
        lines[latent, task, part, metric]["subjects"][row["subject"]] = [
            row[key] for key in ("value", "low", "high", "items", "failed")
        ]
    for row in tables.ask(SIMULATIONS, first, last, first, last):
        if entry := found.get(row.pop("latent"), {}):
            entry["simulations"].append(row)
    return found
