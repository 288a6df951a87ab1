"""The part of an evaluation that reads the SAE's feature tables: programs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from sae_harvest.common.errors import RunError
from sae_harvest.pipelines.evaluate.programs.run import write_programs
from sae_harvest.pipelines.evaluate.report.inputs import Inputs
from sae_harvest.pipelines.evaluate.report.parts import Part
from sae_harvest.pipelines.features.tables.folder import require_run
from sae_harvest.pipelines.source import Locations


def features_of(folders: Sequence[Path], digest: str, store_digest: str) -> Path | None:
    """Return the folder with the tables of an SAE over a store; None if it is not among them.

    Raises:
        RunError: a folder holds no tables.
    """
    for folder in folders:
        run = require_run(folder)
        if (run["sae_digest"], run["store_digest"]) == (digest, store_digest):
            return folder
    return None


def require_used(folders: Sequence[Path], used: Sequence[Path | None]) -> None:
    """Raise `RunError` if a folder holds tables of another SAE or store than those evaluated."""
    for folder in folders:
        if folder not in used:
            raise RunError(
                f"{folder} holds tables of another SAE or another store than those given; build "
                "the tables of this SAE over this store, or leave out --features."
            )


def programs_part(inputs: Inputs) -> Part:
    """Learn programs from the stored firings, and score them on documents that they never saw."""
    assert inputs.features is not None

    def on_progress(stage: str, done: int, total: int) -> None:
        inputs.progress(stage)(done, total)

    n2g = inputs.settings.n2g_latents
    figures = write_programs(
        inputs.features,
        n2g_latents=n2g,
        device=inputs.device,
        moved=Locations(saes=[inputs.path], stores=[inputs.store.place]),
        on_progress=on_progress,
    )
    notes = [
        "Programs are learnt from the documents of the explain split and scored on all rows of the "
        f"others. All latents have a table of tokens and a trie; {n2g} latents, drawn at random, "
        f"have an N2G program. They are in {inputs.features}/programs.parquet."
    ]
    return Part(figures, notes=notes)
