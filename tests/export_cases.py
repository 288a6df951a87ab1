"""Feature tables to export, and the command that does it."""

from __future__ import annotations

import gzip
import json
import math
from pathlib import Path
from typing import Any

import click
import numpy as np
from click.testing import CliRunner, Result

from sae_harvest.common.console import Commands
from sae_harvest.pipelines.exports.cli import export_command
from sae_harvest.pipelines.exports.tables import BARS
from sae_harvest.pipelines.features.building.build import build
from sae_harvest.pipelines.features.tables.folder import DECILES
from tests.feature_cases import BUILD_CONFIG, read_table, save_sae, sentence

Triples = dict[tuple[int, int], float]  # activations by row and latent
SHOWN = ("top", *(f"decile_{tenth}" for tenth in range(DECILES, 0, -1)))


@click.group(cls=Commands)
def group() -> None:
    """The command among others, which tell errors in a sentence."""


group.add_command(export_command)


def built(store: Path, root: Path) -> Path:
    """Tables of a random dictionary with one latent that never fires."""
    build(store, save_sae(store, root / "sae"), root / "features", BUILD_CONFIG)
    return root / "features"


def triples_of(features: Path) -> Triples:
    """All firings of tables."""
    return {(f["row"], f["latent"]): f["value"] for f in read_table(features, "firings/*")}


def half(firings: Triples) -> Triples:
    """Activations as delphi rounds them."""
    return {key: float(np.float16(value)) for key, value in firings.items()}


def run(features: Path | list[Path], form: str, out: Path, *options: object) -> Result:
    folders = features if isinstance(features, list) else [features]
    given = [word for folder in folders for word in ("--features", folder)]
    arguments = ["export", *given, "--format", form, "--out", out, *options]
    return CliRunner().invoke(group, [str(a) for a in arguments])


def exported(features: Path | list[Path], form: str, out: Path, *options: object) -> Path:
    result = run(features, form, out, *options)
    assert result.exit_code == 0, (result.output, result.exception)
    return out


def refusal(features: Path | list[Path], form: str, out: Path, *options: object) -> str:
    """The sentence; nothing is left of the attempt."""
    before = sorted(out.parent.iterdir())
    result = run(features, form, out, *options)
    assert result.exit_code == 1, (result.output, result.exception)
    assert sorted(out.parent.iterdir()) == before
    return sentence(result.stderr)


def firings_of(features: Path) -> dict[int, np.ndarray]:
    """Activations of each latent where it fires, float64, in the order of rows."""
    found: dict[int, list[tuple[int, float]]] = {}
    for row in read_table(features, "firings/*"):
        found.setdefault(row["latent"], []).append((row["row"], row["value"]))
    return {latent: np.array([v for _, v in sorted(pairs)]) for latent, pairs in found.items()}


def contexts_of(features: Path, latent: int) -> dict[str, list[dict[str, Any]]]:
    """By stratum, in the order of ranks."""
    found: dict[str, list[dict[str, Any]]] = {}
    for row in read_table(features, "contexts"):
        if row["latent"] == latent:
            found.setdefault(row["stratum"], []).append(row)
    return found


def lines(path: Path) -> list[dict[str, Any]]:
    data = path.read_bytes()
    text = (gzip.decompress(data) if path.suffix == ".gz" else data).decode()
    assert text.endswith("\n")
    assert text.splitlines() == text[:-1].split("\n")  # no other line ends within
    return [json.loads(line) for line in text.splitlines()]


def as_float32(values: list[float]) -> list[float]:
    """Numbers as the tables hold them."""
    return np.array(values, np.float32).astype(float).tolist()


def equal_bars(a: np.ndarray) -> list[int]:
    """Counts in bars from 0 to the maximum, each with its upper edge; by a loop."""
    counts = [0] * BARS
    for value in a:
        counts[min(math.ceil(value / (a.max() / BARS)), BARS) - 1] += 1
    return counts


def batches(folder: Path) -> list[dict[str, Any]]:
    paths = sorted(folder.iterdir(), key=lambda path: int(path.name.split("-")[1].split(".")[0]))
    return [record for path in paths for record in lines(path)]
